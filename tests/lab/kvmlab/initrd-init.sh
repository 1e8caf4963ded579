#!/bin/busybox sh
# First program of the lab: reach the disks, mount the root read-only and go on there with the job's own init.
# Disks: vda root, vdb packages, vdc the job (a tar archive), vdd results (a tar archive, written at the end).
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /newroot
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do
    insmod "$module" || echo "lab: cannot load $module"
done
until [ -b /dev/vda ] && [ -b /dev/vdd ]; do sleep 0.05; done
mount -t ext4 -o ro /dev/vda /newroot
mount -t tmpfs -o size=75% lab /newroot/lab
tar -x -f /dev/vdc -C /newroot/lab
umount /proc /sys
mount --move /dev /newroot/dev
exec switch_root /newroot /lab/init
