#!/bin/sh
# What the images' hosts share, twice each as two hosts have it: an NFS 4.2 and an SMB share mounted, an iSCSI disk logged
# in to. On each of them shared_storage.py, and with `machines` shared_machines.py.
#
# The servers come along:
#     sh tests/lab/payload/fetch_servers.sh srv
#     python tests/lab/lab.py run --timeout 900 --copy srv:srv -- sh /lab/tree/tests/lab/payload/mount_shares.sh machines
#
#     mount_shares.sh [machines] [nfs] [smb] [iscsi]       all three, unless some are named
SERVERS=/lab/srv
LIBRARIES=$(find $SERVERS -name "*.so*" -printf '%h\n' | sort -u | tr '\n' ':')
PAYLOAD=$(dirname "$0")
MACHINES=; WANTED=
for word in "$@"; do
    if [ "$word" = machines ]; then MACHINES=yes; else WANTED="$WANTED $word"; fi
done
WANTED=${WANTED:-nfs smb iscsi}
wanted() { case " $WANTED " in *" $1 "*) true ;; *) false ;; esac; }
for module in loop nfs nfsv4 cifs sd_mod iscsi_tcp; do modprobe $module; done
mkdir -p /tmp/export /tmp/n1 /tmp/n2 /tmp/s1 /tmp/s2 /tmp/s3 /tmp/recovery /tmp/smb /run/ganesha
# The lab's root is read-only, and ganesha finds file systems in /etc/mtab.
cp -a /etc /tmp/etc && mount --bind /tmp/etc /etc && ln -sf /proc/self/mounts /etc/mtab
mount -o loop $SERVERS/fs.img /tmp/export || exit 3
mkdir -m 777 /tmp/export/smb

cat > /tmp/ganesha.conf <<END
NFS_CORE_PARAM {
    Protocols = 4; Enable_NLM = false; Enable_RQUOTA = false; mount_path_pseudo = true;
    Plugins_Dir = "$SERVERS/usr/lib/x86_64-linux-gnu/ganesha";
}
NFSV4 { Graceless = true; RecoveryBackend = fs; RecoveryRoot = "/tmp/recovery"; Minor_Versions = 1,2; }
EXPORT {
    Export_Id = 1; Path = "/tmp/export"; Pseudo = "/export"; Access_Type = RW; Squash = No_Root_Squash;
    SecType = sys; Protocols = 4; Transports = TCP; FSAL { Name = VFS; }
}
END
cat > /tmp/smb.conf <<END
[global]
private dir = /tmp/smb
lock directory = /tmp/smb
state directory = /tmp/smb
cache directory = /tmp/smb
pid directory = /tmp/smb
ncalrpc dir = /tmp/smb
log file = /tmp/smb/log
map to guest = Bad User
guest account = root
bind interfaces only = yes
interfaces = lo
disable spoolss = yes
load printers = no
[share]
path = /tmp/export/smb
guest ok = yes
read only = no
force user = root
END
FAILED=0

# check NAME MEDIUM_A MEDIUM_B [OTHER]: both programs; a directory or a medium for each host.
check() {
    name=$1
    shift
    echo "=== $name"
    python3 "$PAYLOAD/shared_storage.py" "$@" || { echo "=== $name: FAILED"; FAILED=1; return; }
    [ -z "$MACHINES" ] || python3 "$PAYLOAD/shared_machines.py" "$1" "$2" || { echo "=== $name: FAILED"; FAILED=1; }
}

# with COMMAND...: one of the programs that came along.
with() { LD_LIBRARY_PATH=$LIBRARIES "$@"; }

# reach DIRECTORY OPTION: vmf must find out that locks there reach one host only, by that mount option; "" for: every host.
reach() {
    python3 - "$1" "$2" <<END || { echo "=== locks on $1: FAILED"; FAILED=1; }
import sys
from vmf_storage_file import mounts
found = mounts.local_locks_at(sys.argv[1])
print("locks on", sys.argv[1], found or "reach every host")
sys.exit(found != (f"it is mounted with {sys.argv[2]}" if sys.argv[2] else ""))
END
}

# try_mount TYPE OPTIONS WHAT WHERE, until the server answers. No helper programs: the kernel takes the options itself.
try_mount() {
    for attempt in 1 2 3 4 5 6 7 8; do
        mount -i -t "$1" -o "$2" "$3" "$4" 2>/dev/null && return 0
        sleep 1
    done
    echo "cannot mount $3"
    tail -5 /tmp/ganesha.log /tmp/smbd.out
    exit 4
}

# NFS in any case: it keeps the lease of the iSCSI disk.
with $SERVERS/usr/bin/ganesha.nfsd -F -L /tmp/ganesha.log -f /tmp/ganesha.conf -p /tmp/ganesha.pid &
for place in n1 n2; do
    try_mount nfs4 vers=4.2,addr=127.0.0.1,clientaddr=127.0.0.1,nosharecache 127.0.0.1:/export /tmp/$place
done
# iSCSI: two initiators, each with a session and so a disk of its own, and a second target for "another disk".
disk_of() { # INITIATOR TARGET: /dev/sdX
    for session in /sys/class/iscsi_session/*; do
        [ "$(cat "$session/initiatorname" 2>/dev/null)" = "$1" ] || continue
        [ "$(cat "$session/targetname")" = "$2" ] || continue
        for disk in "$session"/device/target*/*:1/block/*; do [ -e "$disk" ] && echo "/dev/${disk##*/}"; done
    done
}
TARGET=iqn.2026-01.example
login() { # INITIATOR TARGET ADDRESS
    with $SERVERS/sbin/iscsistart -i "$1" -t "$2" -g 1 -a "$3" -p 3260 > /tmp/login.out 2>&1 ||
        { echo "cannot log in to $2 as $1"; cat /tmp/login.out /tmp/tgtd.out; return 1; }
    for attempt in 1 2 3 4 5 6 7 8; do [ -n "$(disk_of "$1" "$2")" ] && return 0; sleep 1; done
    echo "no disk of $2 for $1"
    ls -l /sys/class/iscsi_session/*/device/*
    dmesg | tail -20
    return 1
}
iscsi() {
    mkdir -p /run/tgtd /run/lock/iscsi /etc/iscsi
    cp $SERVERS/etc/iscsi/iscsid.conf /etc/iscsi/
    with $SERVERS/usr/sbin/tgtd -f --iscsi portal=0.0.0.0:3260 > /tmp/tgtd.out 2>&1 &
    admin() { with $SERVERS/usr/sbin/tgtadm --lld iscsi "$@"; }
    for attempt in 1 2 3 4 5 6 7 8; do admin --op show --mode sys > /dev/null 2>&1 && break; sleep 1; done
    number=0
    for name in web other; do
        number=$((number + 1))
        truncate -s 4M /tmp/$name.lun
        admin --op new --mode target --tid $number -T $TARGET:$name
        admin --op new --mode logicalunit --tid $number --lun 1 -b /tmp/$name.lun
        admin --op bind --mode target --tid $number -I ALL
    done
    login $TARGET:host-a $TARGET:web 127.0.0.1 && login $TARGET:host-b $TARGET:web 127.0.0.2 &&
        login $TARGET:host-b $TARGET:other 127.0.0.2 || { FAILED=1; return; }
    DISK_A=$(disk_of $TARGET:host-a $TARGET:web)
    DISK_B=$(disk_of $TARGET:host-b $TARGET:web)
    OTHER=$(disk_of $TARGET:host-b $TARGET:other)
    echo "host a has $DISK_A, host b $DISK_B; another disk is $OTHER"
    check iSCSI "file:$DISK_A?lease=/tmp/n1/web.lease" "file:$DISK_B?lease=/tmp/n2/web.lease" \
        "file:$OTHER?lease=/tmp/n2/other.lease"
}
if wanted iscsi; then iscsi; fi

if wanted smb; then
    with $SERVERS/usr/sbin/smbd -F --no-process-group -s /tmp/smb.conf < /dev/null > /tmp/smbd.out 2>&1 &
    for place in s1 s2; do
        try_mount cifs ip=127.0.0.1,vers=3.0,cache=none,nosharesock,username=x,password= //127.0.0.1/share /tmp/$place
    done
    check "SMB 3" /tmp/s1 /tmp/s2
    try_mount cifs ip=127.0.0.1,vers=3.0,cache=none,nosharesock,nobrl,username=x,password= //127.0.0.1/share /tmp/s3
    reach /tmp/s1 ""
    reach /tmp/s3 nobrl
fi
if wanted nfs; then
    check "NFS 4.2" /tmp/n1 /tmp/n2
    reach /tmp/n1 ""
fi
exit $FAILED
