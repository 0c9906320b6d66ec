#!/usr/bin/env bash
# The Debian packages install, run under systemd and go without a trace in a root of their own,
# which boots as a container does. Needs root, debootstrap and the network: the system's own
# release, from the mirror that apt uses here. Exits with 77 where no such root can be made. Where
# systemd can't be the first process of a container, the daemon is started by hand, and the script
# says so.
# check_debs.sh BUILD-FOLDER
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
build=$(cd "$1" && pwd)
scratch=$(mktemp -d /tmp/tinyserve-debs.XXXXXX)
root=$scratch/root
container=
end() {
    [ -z "$container" ] || { kill -KILL "$container" && wait "$container" || true; } 2>/dev/null
    umount -l "$root/proc" 2>/dev/null || true
    rm -rf "$scratch"
}
trap end EXIT

. /etc/os-release
mirror=$(apt-get indextargets --format '$(SITE) $(CODENAME)' 'Created-By: Packages' |
    awk -v c="$VERSION_CODENAME" '$2 == c { print $1; exit }')
fail() { echo "check_debs: $*"; exit 1; }
log() { "$@" >"$scratch/log" 2>&1 || { tail -n 40 "$scratch/log"; exit 1; }; }
(cd "$build" && rm -f ./*.deb ./*.ddeb && log cpack)
debootstrap --variant=minbase --include=systemd,dbus "$VERSION_CODENAME" "$root" "$mirror" \
    >"$scratch/log" 2>&1 || {
    tail -n 5 "$scratch/log"
    echo "skipped: no root of its own can be made here"
    exit 77
}
for file in /etc/apt/apt.conf.d/*proxy* /etc/resolv.conf; do # how this machine reaches the mirror
    [ ! -e "$file" ] || cp "$file" "$root$file"
done
mkdir "$root/debs"
cp "$build"/tinyserve*.deb "$build"/libtinyserve*.deb "$root/debs"
echo "packages: $(cd "$root/debs" && echo *.deb)"

# systemd, and a way to run things beside it.
unshare --mount --pid --cgroup --fork --kill-child "$here/boot_root.sh" "$root" \
    >"$scratch/boot" 2>&1 &
container=$!
until first=$(pgrep -P "$container" -x systemd) || ! kill -0 "$container" 2>/dev/null; do :; done
booted() { [ -n "$first" ]; }
inside() {
    if booted; then
        nsenter -t "$first" --mount --pid --cgroup --root \
            env -C / DEBIAN_FRONTEND=noninteractive LC_ALL=C \
            PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"
    else
        chroot "$root" env DEBIAN_FRONTEND=noninteractive LC_ALL=C "$@"
    fi
}
began=$SECONDS
until ! booted || inside timeout 60 systemctl is-system-running --wait 2>/dev/null |
    grep -Eq 'running|degraded'; do
    kill -0 "$container" 2>/dev/null && [ "$((SECONDS - began))" -lt 120 ] || first=
done
booted || {
    echo "systemd doesn't run in a container here: $(tail -n 1 "$scratch/boot")"
    kill -KILL "$container" 2>/dev/null || true
    container=
    mount -t proc none "$root/proc" 2>/dev/null || true
}
property() { inside systemctl show --value -p "$1" tinyserved; }
until_property() { # NAME VALUE: waits until the unit's property is so
    until [ "$(property "$1")" = "$2" ]; do
        [ "$((SECONDS - began))" -lt 300 ] || fail "the unit's $1 is $(property "$1"), not $2"
    done
}
began=$SECONDS
snapshot() {
    inside sh -c "find etc/tinyserve usr/sbin usr/lib usr/share/man usr/include \
        -name '*tinyserve*' 2>/dev/null | sort"
}
install() {
    log inside sh -c 'apt-get install -y --reinstall --no-install-recommends \
        /debs/tinyserved_*.deb /debs/tinyserve-tools_*.deb /debs/libtinyserve0_*.deb \
        /debs/libtinyserve-dev_*.deb'
}

install
inside getent passwd tinyserve >/dev/null
[ "$(inside stat -c '%a %U %G' /etc/tinyserve)" = "750 root tinyserve" ] ||
    fail "/etc/tinyserve is somebody else's"
inside tinyserved --check-config --config /etc/tinyserve/tinyserved.conf
inside sed -i 's/^memory = 1G/memory = 64M/; s/^layers = 32/layers = 2/' \
    /etc/tinyserve/tinyserved.conf

if booted; then
    [ "$(property ActiveState) $(property UnitFileState)" = "inactive disabled" ] ||
        fail "installing it has started it"
    log inside systemctl enable --now tinyserved # returns when it has said READY
    [ "$(property ActiveState) $(property Type)" = "active notify" ] || fail "it isn't active"
    inside tsctl pools | grep '^llama-8b ' || fail "no pool"
    inside tsctl check
    [ "$(inside stat -c '%a %U %G' /run/tinyserve)" = "750 tinyserve tinyserve" ] ||
        fail "its folder is somebody else's"
    until property StatusText | grep -q 'sessions, .* blocks used in 1 pools'; do :; done
    inside journalctl -o cat TINYSERVE_POOL=llama-8b | grep "pool 'llama-8b' on host" >/dev/null ||
        fail "no field in the journal"

    # Who may connect: root and the group.
    log inside useradd --groups tinyserve worker
    log inside useradd stranger
    inside setpriv --reuid worker --regid worker --init-groups tsctl status >/dev/null ||
        fail "the group can't connect"
    ! inside setpriv --reuid stranger --regid stranger --init-groups tsctl status \
        2>"$scratch/log" ||
        fail "a stranger can connect"
    grep -q "in the daemon's group (tinyserve)" "$scratch/log" ||
        fail "a stranger is told: $(cat "$scratch/log")"

    # It is told to read its configuration anew, and says what came of it; a group's members become
    # operators.
    as_worker() { inside setpriv --reuid worker --regid worker --init-groups "$@"; }
    ! as_worker tsctl drain off 2>"$scratch/log" || fail "anybody is an operator"
    grep -q 'is no operator' "$scratch/log" || fail "a worker is told: $(cat "$scratch/log")"
    inside sed -i 's/^# operators =.*/operators = tinyserve/' /etc/tinyserve/tinyserved.conf
    inside sed -i 's/^# log_level = .*/log_level = debug/' /etc/tinyserve/tinyserved.conf
    log inside systemctl reload tinyserved
    until inside journalctl -u tinyserved -o cat | grep 'was read again' >/dev/null; do
        [ "$((SECONDS - began))" -lt 300 ] || fail "no word of the new configuration"
    done

    as_worker tsctl drain off || fail "a member of the operators' group is none"

    # One for each GPU: the same daemon beside it, in host memory since there is none here.
    inside sh -c 'cd /etc/tinyserve &&
        sed "s/^metrics = .*/metrics = off/; s/^# device = .*/device = host/" tinyserved.conf \
            >tinyserved-0.conf &&
        chgrp tinyserve tinyserved-0.conf && chmod 640 tinyserved-0.conf'
    log inside systemctl start tinyserved@0
    inside tsctl -s ipc:///run/tinyserve-0/tinyserve.sock check
    log inside systemctl stop tinyserved@0
    inside rm /etc/tinyserve/tinyserved-0.conf

    # Killed, it comes again; stopped without a word, the watchdog ends it, and it comes again.
    inside sh -c "kill -KILL $(property MainPID)"
    until_property NRestarts 1
    until_property ActiveState active
    inside sh -c 'mkdir /run/systemd/system/tinyserved.service.d &&
        printf "[Service]\nWatchdogSec=2\n" >/run/systemd/system/tinyserved.service.d/test.conf'
    log inside systemctl daemon-reload
    log inside systemctl restart tinyserved
    inside sh -c "kill -STOP $(property MainPID)"
    until_property NRestarts 1
    until_property ActiveState active
    until inside journalctl -u tinyserved -u init.scope -o cat | grep 'Watchdog timeout' >/dev/null
    do # the journal gets it a moment later
        [ "$((SECONDS - began))" -lt 300 ] || fail "it wasn't the watchdog"
    done

    # Another version (the same one) takes over what systemd holds, and a worker that generates text
    # meanwhile goes on with the model's own bytes.
    model=/usr/share/tinyserve/model
    inside tsctl pool create tiny layers=6 kv_heads=2 head_dim=64 dtype=fp32 memory=32M
    log inside ts-generate -m $model --prompt Once --tokens 32 --keep story
    before=$(property MainPID)
    [ "$(property NFileDescriptorStore)" -gt 0 ] || fail "systemd holds nothing of it"
    inside sh -c "until test -e /upgraded; do
        ts-generate --wait 60 -m $model --verify $model/reference.json:0 || exit; done" \
        >"$scratch/worker" 2>&1 &
    worker=$!
    install
    inside touch /upgraded
    wait "$worker" || fail "a worker: $(tail -n 3 "$scratch/worker")"
    [ "$(property ActiveState)" = active ] && [ "$(property MainPID)" != "$before" ] ||
        fail "an upgrade doesn't restart it"
    grep -q 'tinyserved.service was restarted' "$scratch/log" ||
        fail "an upgrade says: $(cat "$scratch/log")"
    inside tsctl seqs tiny | grep story || fail "what was kept is gone"
    inside tsctl check
    version=$(inside systemctl --version | awk 'NR == 1 { print $2 }')
    echo "under systemd $version: started, reloaded, killed, watched, upgraded"
else
    # As the unit runs it: that user, that configuration.
    mkdir "$root/run/tinyserve" && inside chown tinyserve:tinyserve /run/tinyserve
    chroot "$root" setpriv --reuid tinyserve --regid tinyserve --clear-groups tinyserved \
        --config /etc/tinyserve/tinyserved.conf --set metrics=off >"$scratch/daemon.log" 2>&1 &
    daemon=$!
    inside tsctl --wait 60 pools | grep '^llama-8b ' || { cat "$scratch/daemon.log"; exit 1; }
    inside tsctl check
    kill -TERM "$daemon"
    wait "$daemon"

    # What an upgrade does to a unit that runs: with a service manager that notes what it is told.
    mkdir -p "$root/fake" "$root/run/systemd/system"
    cat >"$root/fake/systemctl" <<'END'
#!/bin/sh
echo "$*" >>/fake/told
case "$*" in
list-units*) echo "tinyserved.service loaded active running" ;;
show*) cat /fake/held ;;
esac
END
    chmod +x "$root/fake/systemctl"
    upgrade() { # HELD: descriptors that it says systemd holds
        echo "$1" >"$root/fake/held"
        rm -f "$root/fake/told"
        inside env PATH=/fake:/usr/sbin:/usr/bin:/sbin:/bin \
            /var/lib/dpkg/info/tinyserved.postinst configure 0.1.0 >"$scratch/log"
    }
    upgrade 5
    grep -q '^restart tinyserved.service' "$root/fake/told" || fail "an upgrade doesn't restart it"
    upgrade 0
    ! grep -q '^restart' "$root/fake/told" || fail "an upgrade empties a daemon that stores nothing"
    grep -q 'tsctl drain; systemctl restart tinyserved.service' "$scratch/log" ||
        fail "an upgrade says: $(cat "$scratch/log")"
    echo 'provider = cuda-ipc' >"$root/etc/tinyserve/other.conf"
    upgrade 5
    ! grep -q '^restart' "$root/fake/told" || fail "an upgrade empties a pool of cuda-ipc memory"
    rm -r "$root/etc/tinyserve/other.conf" "$root/fake" "$root/run/systemd"
fi

inside sh -c 'echo "# mine" >>/etc/tinyserve/tinyserved.conf'
log inside dpkg -r tinyserved tinyserve-tools libtinyserve-dev libtinyserve0
[ "$(snapshot)" = "etc/tinyserve
etc/tinyserve/tinyserved.conf" ] || { snapshot; exit 1; }
inside test ! -e /run/tinyserve/tinyserve.sock || fail "its socket is left"
booted && [ "$(property ActiveState)" = active ] && fail "it runs on without its package"
inside grep -q '# mine' /etc/tinyserve/tinyserved.conf # a configuration outlives its package
log inside dpkg -P tinyserved
[ -z "$(snapshot)" ] || { snapshot; exit 1; }
echo "installed, run, removed and purged in a fresh $VERSION_CODENAME"
