#!/usr/bin/env bash
# The Debian packages install, start and go without a trace in a root of their own. Needs root, debootstrap
# and the network: the system's own release, from the mirror that apt uses here. Exits with 77 where no such
# root can be made.
# check_debs.sh BUILD-FOLDER
set -euo pipefail
build=$(cd "$1" && pwd)
scratch=$(mktemp -d /tmp/tinyserve-debs.XXXXXX)
root=$scratch/root
trap 'umount -l "$root/proc" 2>/dev/null || true; rm -rf "$scratch"' EXIT

. /etc/os-release
mirror=$(apt-get indextargets --format '$(SITE) $(CODENAME)' 'Created-By: Packages' |
    awk -v c="$VERSION_CODENAME" '$2 == c { print $1; exit }')
log() { "$@" >"$scratch/log" 2>&1 || { tail -n 40 "$scratch/log"; exit 1; }; }
(cd "$build" && rm -f ./*.deb && log cpack)
debootstrap --variant=minbase "$VERSION_CODENAME" "$root" "$mirror" >"$scratch/log" 2>&1 || {
    tail -n 5 "$scratch/log"
    echo "skipped: no root of its own can be made here"
    exit 77
}
for file in /etc/apt/apt.conf.d/*proxy* /etc/resolv.conf; do # how this machine reaches the mirror
    [ ! -e "$file" ] || cp "$file" "$root$file"
done
mount -t proc none "$root/proc" 2>/dev/null || true
inside() { chroot "$root" env DEBIAN_FRONTEND=noninteractive LC_ALL=C "$@"; }
snapshot() { (cd "$root" && find etc/tinyserve usr/sbin usr/lib usr/share/man usr/include -name '*tinyserve*' 2>/dev/null | sort); }

mkdir "$root/debs"
cp "$build"/tinyserve*.deb "$build"/libtinyserve*.deb "$root/debs"
echo "packages: $(cd "$root/debs" && echo *.deb)"
log inside sh -c 'apt-get install -y --no-install-recommends /debs/tinyserved_*.deb /debs/tinyserve-tools_*.deb \
    /debs/libtinyserve0_*.deb /debs/libtinyserve-dev_*.deb'
inside getent passwd tinyserve >/dev/null
[ "$(inside stat -c '%a %U %G' /etc/tinyserve)" = "750 root tinyserve" ]
inside tinyserved --check-config --config /etc/tinyserve/tinyserved.conf

# As the unit runs it: that user, that configuration; the pool is smaller.
mkdir "$root/run/tinyserve" && inside chown tinyserve:tinyserve /run/tinyserve
chroot "$root" setpriv --reuid tinyserve --regid tinyserve --clear-groups tinyserved \
    --config /etc/tinyserve/tinyserved.conf --set metrics=off --pool tiny:layers=2,kv_heads=2,head_dim=64,blocks=64 \
    >"$scratch/daemon.log" 2>&1 &
daemon=$!
inside tsctl --wait 60 pools | grep '^tiny ' || { cat "$scratch/daemon.log"; exit 1; }
inside tsctl check
kill -TERM "$daemon"
wait "$daemon"
[ ! -e "$root/run/tinyserve/tinyserve.sock" ]

echo "# mine" >>"$root/etc/tinyserve/tinyserved.conf"
log inside dpkg -r tinyserved tinyserve-tools libtinyserve-dev libtinyserve0
[ "$(snapshot)" = "etc/tinyserve
etc/tinyserve/tinyserved.conf" ] || { snapshot; exit 1; }
grep -q '# mine' "$root/etc/tinyserve/tinyserved.conf" # a configuration outlives its package
log inside dpkg -P tinyserved
[ -z "$(snapshot)" ] || { snapshot; exit 1; }
echo "installed, started, removed and purged in a fresh $VERSION_CODENAME"
