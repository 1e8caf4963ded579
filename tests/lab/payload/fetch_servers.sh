#!/bin/sh
# Unpack, without installing, the servers and clients that mount_shares.sh takes to the lab: NFS, SMB and iSCSI.
#
#     fetch_servers.sh DIRECTORY
#
# Debian packages, from apt's sources (31 MB), with the libraries that they need.
set -e
mkdir -p "$1/debs"
cd "$1/debs"
options="--recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances"
packages=$(apt-cache depends $options nfs-ganesha-vfs samba tgt open-iscsi nfs-common | grep '^[a-z]' | sort -u |
    grep -E '^(lib[a-z0-9.+-]*|samba-libs|nfs-ganesha.*|samba|tgt|open-iscsi)$' |
    grep -vE 'perl|python|^libc6$|libc6-|^libgcc|pam')
apt-get download -qq $packages
for deb in *.deb; do dpkg -x "$deb" ..; done
cd ..
rm -rf debs usr/share usr/include
truncate -s 64M fs.img
PATH=$PATH:/usr/sbin:/sbin mkfs.ext4 -q -F fs.img
