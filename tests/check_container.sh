#!/usr/bin/env bash
# The images of systemd/container/Containerfile build from a bare Debian, and a worker in a
# container reaches the daemon in another where they share the socket's folder alone: each has its
# own mount, PID, IPC, UTS and network namespaces. buildah carries out the file's own lines (it
# needs no service, unlike docker); containers are namespaces by unshare, since an engine's runtime
# may not run inside a container. Needs root, debootstrap, buildah and Debian's mirror; exits with
# 77 where no such root can be made.
# check_container.sh
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d /tmp/tinyserve-container.XXXXXX)
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
storage=(--root "$scratch/storage" --runroot "$scratch/run")
pids=()
end() {
    local pid
    for pid in "${pids[@]}"; do { kill -KILL "$pid" && wait "$pid" || true; } 2>/dev/null; done
    buildah "${storage[@]}" umount --all >/dev/null 2>&1 || true
    rm -rf "$scratch"
}
trap end EXIT
fail() { echo "check_container: $*"; exit 1; }
log() { "$@" >"$scratch/log" 2>&1 || { tail -n 40 "$scratch/log"; exit 1; }; }

# A base as an engine would pull it: Debian's minimal system, with this machine's way to the mirror.
. /etc/os-release
mirror=$(apt-get indextargets --format '$(SITE) $(CODENAME)' 'Created-By: Packages' |
    awk -v c="$VERSION_CODENAME" '$2 == c { print $1; exit }')
debootstrap --variant=minbase "$VERSION_CODENAME" "$scratch/base" "$mirror" \
    >"$scratch/log" 2>&1 || {
    tail -n 5 "$scratch/log"
    echo "skipped: no root of its own can be made here"
    exit 77
}
for file in /etc/apt/apt.conf.d/*proxy* /etc/resolv.conf; do
    [ ! -e "$file" ] || cp "$file" "$scratch/base$file"
done
base=$(buildah "${storage[@]}" from scratch)
log buildah "${storage[@]}" add "$base" "$scratch/base" /
log buildah "${storage[@]}" commit "$base" localhost/base
rm -rf "$scratch/base"

image() { # TARGET: builds it; its root in $scratch/TARGET.root, which is told
    local container
    log buildah "${storage[@]}" build --layers --format docker --network host \
        --build-arg BASE=localhost/base \
        --ignorefile "$source/systemd/container/Containerfile.dockerignore" \
        --file "$source/systemd/container/Containerfile" --target "$1" --tag "localhost/$1" \
        "$source"
    container=$(buildah "${storage[@]}" from "localhost/$1")
    buildah "${storage[@]}" mount "$container" >"$scratch/$1.root"
    buildah "${storage[@]}" inspect --type image "localhost/$1" |
        jq .Docker.config >"$scratch/$1.json"
}
began=$SECONDS
image daemon
image worker
echo "built daemon and worker from $VERSION_CODENAME's minimal system in $((SECONDS - began)) s"

# configured IMAGE EXPRESSION: what the image's configuration says, one word a line
configured() { jq -r "$2" "$scratch/$1.json"; }

# run IMAGE WORDS...: as an engine starts it, read-only, with no capability, in namespaces of its
# own; the socket's folder is all that comes from outside.
socket=$scratch/socket
run() {
    local image=$1 root
    shift
    root=$(cat "$scratch/$image.root")
    local user groups
    user=$(configured "$image" .User)
    groups=$(chroot "$root" id -G "$user" | tr ' ' ,)
    exec unshare --mount --pid --ipc --uts --net --cgroup --fork --kill-child sh -c '
        root=$1 user=$2 groups=$3 socket=$4; shift 4
        mount --bind "$root" "$root" && mount --bind "$socket" "$root/run/tinyserve" &&
        mount -o remount,bind,ro "$root" && mount -t proc proc "$root/proc" &&
        exec chroot "$root" setpriv --reuid "$user" --regid "$user" --groups "$groups" \
            --bounding-set -all --inh-caps -all --no-new-privs --pdeathsig KILL env -i "$@"
    ' run "$root" "$user" "$groups" "$socket" \
        "$(configured "$image" '.Env[] | select(startswith("PATH="))')" "$@"
}
install -d -m 0750 -o 990 -g 990 "$socket" # as an engine makes a new volume of the image's folder
mapfile -t entry < <(configured daemon '.Entrypoint[]')
mapfile -t work < <(configured worker '.Cmd[]')
mapfile -t health < <(configured daemon '.Healthcheck.Test[1:][]')
pool=tiny:layers=6,kv_heads=2,head_dim=64,dtype=fp32,memory=24M,slab=8M,device=host

(run daemon "${entry[@]}" --pool "$pool") >"$scratch/daemon.log" 2>&1 &
pids+=($!)
(run daemon "${health[0]}" --wait 60 "${health[@]:1}") >"$scratch/log" || {
    cat "$scratch/log" "$scratch/daemon.log"
    exit 1
}
(run worker "${work[@]}") >"$scratch/first" 2>"$scratch/first.log" || {
    cat "$scratch/first.log" "$scratch/daemon.log"
    exit 1
}
(run worker "${work[@]}") >"$scratch/second" 2>"$scratch/second.log"
cmp "$scratch/first" "$scratch/second" || fail "two workers wrote different text"
grep '^prompt:' "$scratch/second.log"
grep -q ' 1 computed' "$scratch/second.log" || fail "the second found too little of the first's"

# One that is killed leaves nothing; who isn't in the group is told.
(run worker tsctl --json --watch=0.2 status) >"$scratch/watch" &
watcher=$!
pids+=("$watcher")
until [ -s "$scratch/watch" ]; do kill -0 "$watcher"; done
kill -KILL "$watcher"
wait "$watcher" 2>/dev/null || true
until (run daemon tsctl --json status) | jq -e '.sessions == 1' >/dev/null; do
    [ "$((SECONDS - began))" -lt 600 ] || fail "a killed worker's session is left"
done
sed -i 's/^tinyserve:x:990:.*/tinyserve:x:990:/' "$(cat "$scratch/worker.root")/etc/group"
! (run worker tsctl status) 2>"$scratch/log" || fail "a stranger can connect"
grep -q "in the daemon's group" "$scratch/log" || fail "a stranger is told: $(cat "$scratch/log")"
(run daemon tsctl check)
echo "daemon and worker share the socket's folder, and no namespace: generated, shared, killed"
