#!/bin/sh
# Serve and mount an NFS 4.2 and an SMB share twice each in the lab, and run shared_storage.py on both.
#
# The servers come along; on the host (Debian packages, unpacked, not installed; all libraries that `ldd` names, too):
#     apt-get download nfs-ganesha nfs-ganesha-vfs samba ...; for deb in *.deb; do dpkg -x $deb srv; done
#     truncate -s 64M srv/fs.img; mkfs.ext4 -q -F srv/fs.img
#     python tests/lab/lab.py run --timeout 900 --copy srv:srv -- sh /lab/tree/tests/lab/payload/mount_shares.sh
SERVERS=/lab/srv
LIBRARIES=$(find $SERVERS -name "*.so*" -printf '%h\n' | sort -u | tr '\n' ':')
CHECK=$(dirname "$0")/shared_storage.py
for module in loop nfs nfsv4 cifs; do modprobe $module; done
mkdir -p /tmp/export /tmp/n1 /tmp/n2 /tmp/s1 /tmp/s2 /tmp/recovery /tmp/smb /run/ganesha
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
export LD_LIBRARY_PATH=$LIBRARIES
$SERVERS/usr/bin/ganesha.nfsd -F -L /tmp/ganesha.log -f /tmp/ganesha.conf -p /tmp/ganesha.pid &
$SERVERS/usr/sbin/smbd -F --no-process-group -s /tmp/smb.conf < /dev/null > /tmp/smbd.out 2>&1 &
unset LD_LIBRARY_PATH

# mount TYPE OPTIONS WHAT WHERE, until the server answers. No helper programs: the kernel takes the options itself.
try_mount() {
    for attempt in 1 2 3 4 5 6 7 8; do
        mount -i -t "$1" -o "$2" "$3" "$4" 2>/dev/null && return 0
        sleep 1
    done
    echo "cannot mount $3"
    tail -5 /tmp/ganesha.log /tmp/smbd.out
    exit 4
}
for place in n1 n2; do
    try_mount nfs4 vers=4.2,addr=127.0.0.1,clientaddr=127.0.0.1,nosharecache 127.0.0.1:/export /tmp/$place
done
for place in s1 s2; do
    try_mount cifs ip=127.0.0.1,vers=3.0,cache=none,nosharesock,username=x,password= //127.0.0.1/share /tmp/$place
done
python3 "$CHECK" /tmp/n1 /tmp/n2 && python3 "$CHECK" /tmp/s1 /tmp/s2
