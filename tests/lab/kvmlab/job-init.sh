#!/bin/sh
# Runs one job in the lab: settles the machine, runs /lab/command, writes its status and results, switches off.
# /lab/settings (shell) sets LAB_TIMEOUT, in the lab's seconds, and VMF_LAB_SLOWDOWN, how long one of them takes outside.
export PATH=/lab/site/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/lab/home LANG=C.UTF-8 TERM=dumb PYTHONUNBUFFERED=1
. /lab/settings
# whatever happens below, the lab ends by itself
( sleep $((LAB_TIMEOUT + 30)); echo "lab: watchdog"; busybox poweroff -f ) &

mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for directory in /dev/shm /run /tmp /var/tmp; do mount -t tmpfs tmpfs $directory; done
chmod 1777 /dev/shm /tmp /var/tmp
ln -s /proc/self/fd /dev/fd
mkdir -p /lab/deps /lab/home /lab/out/results /lab/tree
mount -t ext4 -o ro /dev/vdb /lab/deps
busybox ifconfig lo 127.0.0.1 up
busybox hostname vmf-lab
modprobe virtio_console
modprobe kvm-amd || echo "lab: no kvm-amd"
export VMF_LAB=1 VMF_LAB_RESULTS=/lab/out/results VMF_LAB_SLOWDOWN
# what vmf.testing.guests looks for
export VMF_KERNEL=/boot/vmlinuz VMF_BUSYBOX=/bin/busybox VMF_CACHE=/lab/cache
until [ -c /dev/vport0p1 ] && [ -c /dev/vport0p2 ]; do sleep 0.05; done

cd /lab/tree
cut -d' ' -f1 /proc/uptime > /lab/out/uptime
timeout -k 5 "$LAB_TIMEOUT" /bin/sh /lab/command < /dev/null > /dev/vport0p1 2> /dev/vport0p2
echo $? > /lab/out/status
cut -d' ' -f1 /proc/uptime >> /lab/out/uptime
dmesg > /lab/out/dmesg
echo "lab: writing results"
tar -c -f /dev/vdd -C /lab/out status uptime dmesg results || echo "lab: the results do not fit"
sync
busybox poweroff -f
