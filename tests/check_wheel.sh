#!/usr/bin/env bash
# The wheel serves a user without root, a compiler or a tree. It is built, and then
#   - in a root of its own with Debian's Python and nothing else, a user makes a venv, installs it,
#     starts the daemon and runs README's worker in Python and tsctl (needs root and debootstrap);
#   - with the oldest and the newest Python that are here (PATH's and pyenv's, 3.9 and later), each
#     in a venv, the suite of tests/python runs against the wheel's library and programs, and
#     README's worker in C is compiled against its headers.
# Needs the network: Debian's mirror, and PyPI for numpy and pytest.
# check_wheel.sh [FOLDER]    a folder that has the wheel already: it isn't built
# SUITE is the release of Debian in the bare root; without it, this system's.
set -euo pipefail
unset PYTHONPATH TINYSERVE_LIBRARY # of a checkout, perhaps
source=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d /tmp/tinyserve-wheel.XXXXXX)
chmod 755 "$scratch"
daemon=
end() {
    [ -z "$daemon" ] || { kill "$daemon" && wait "$daemon" || true; } 2>/dev/null
    rm -rf "$scratch"
}
trap end EXIT
fail() { echo "check_wheel: $*"; exit 1; }
log() { "$@" >"$scratch/log" 2>&1 || { tail -n 40 "$scratch/log"; exit 1; }; }
pip=(-m pip --quiet --disable-pip-version-check)

if [ $# -gt 0 ]; then
    wheels=$(cd "$1" && pwd)
else
    wheels=$scratch/wheels
    log "$source/tools/build-wheel" --out "$wheels"
fi
wheel=$(echo "$wheels"/tinyserve-[0-9]*-py3-none-manylinux_*.whl)
[ -f "$wheel" ] || fail "there is no wheel in $wheels"
echo "$(basename "$wheel"): $(stat -c %s "$wheel") bytes"

# Each library from elsewhere comes with its copyright.
names=$(/usr/bin/python3 -m zipfile --list "$wheel" | awk '{ print $1 }')
libraries=$(grep -c '^tinyserve.libs/.*\.so' <<<"$names")
copyrights=$(grep -c '/licenses/.*/copyright$' <<<"$names")
[ "$libraries" -gt 5 ] && [ "$copyrights" = "$libraries" ] ||
    fail "$libraries libraries, and the copyrights of $copyrights"

block() { # the first block of this language in README
    awk -v start="^\`\`\`$1\$" '
        !done && $0 ~ start { on = 1; next }
        /^```$/ && on { on = 0; done = 1 }
        on' "$source/README.md"
}
pool=llama-8b:layers=2,kv_heads=2,head_dim=64,dtype=bf16,memory=8M,device=host

in_a_bare_root() {
    local root=$scratch/root mirror suite version
    . /etc/os-release
    suite=${SUITE:-$VERSION_CODENAME}
    mirror=$(apt-get indextargets --format '$(SITE) $(CODENAME)' 'Created-By: Packages' |
        awk -v c="$VERSION_CODENAME" '$2 == c { print $1; exit }')
    debootstrap --variant=minbase --include=python3-venv "$suite" "$root" "$mirror" \
        >"$scratch/log" 2>&1 || {
        tail -n 5 "$scratch/log"
        echo "skipped: no root of its own can be made here"
        return 0
    }
    mkdir -p "$root/home/user/wheels"
    cp "$wheel" "$root/home/user/wheels"
    version=$(chroot "$root" python3 -c 'import sys; print(*sys.version_info[:2], sep=".")')
    /usr/bin/python3 "${pip[@]}" download --only-binary :all: --python-version "$version" \
        --dest "$root/home/user/wheels" numpy
    block python >"$root/home/user/example.py"
    cat >"$root/home/user/first-day" <<END
set -eu
cd
for tool in cc gcc c++ cmake make ld; do
    ! command -v \$tool || { echo "there is a compiler"; exit 1; }
done
[ ! -e /usr/lib/x86_64-linux-gnu/libnng.so.1 ] && [ "\$(id -u)" != 0 ]
python3 -m venv venv
venv/bin/pip install --quiet --no-index --find-links wheels 'tinyserve[numpy]'
PATH=\$PWD/venv/bin:\$PATH
tinyserved --pool $pool --set log_level=warning &
tsctl --wait 60 pools
python example.py
tsctl status | grep '^  tokens  *5 '
tsctl seqs >/dev/null
[ -S "/tmp/tinyserve-\$(id -u)/tinyserve.sock" ] # there is no XDG_RUNTIME_DIR
python -m tinyserve.programs
kill %1
wait %1
END
    log chroot "$root" useradd --uid 4711 --home-dir /home/user user
    chroot "$root" chown -R user:user /home/user
    unshare --mount --pid --fork --kill-child sh -c "mount -t proc proc '$root/proc' &&
        exec chroot '$root' setpriv --reuid user --regid user --clear-groups --no-new-privs \
            env -i HOME=/home/user PATH=/usr/bin:/bin bash /home/user/first-day" ||
        fail "in a bare root"
    echo "installed and run in a bare root of $suite," \
        "$(chroot "$root" python3 --version), without root and compiler"
}

# Pythons that are here, 3.9 and later, as "3.9 /path", the oldest first.
pythons() {
    local python
    for python in /usr/bin/python3.?? $(compgen -c python3. | grep -x 'python3\.[0-9]*' || true) \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python3; do
        "$python" -c 'import sys, venv, ensurepip
v = sys.version_info
if v >= (3, 9): print(f"{v[0]}.{v[1]:02} {sys.executable}")' 2>/dev/null || true
    done | sort -u -k 1,1
}

with_python() { # EXECUTABLE
    local at=$scratch/venv native
    local copies=test_nobody_is_told_which_tokens_or_names_others_have_cached
    local refused=test_who_may_not_connect_is_told_which_group_it_takes
    rm -rf "$at"
    "$1" -m venv "$at"
    "$at/bin/python" "${pip[@]}" install numpy pytest "$wheel"
    # shellcheck disable=SC2016
    native=$("$at/bin/python" -c 'from tinyserve import _lib; print(_lib.NATIVE)')
    echo "$("$at/bin/python" --version), $("$at/bin/tsctl" --version)"
    (
        unset TINYSERVE_LIBRARY PYTHONPATH
        cd "$scratch" # the tree is nowhere in Python's path
        cp -r "$source/tests/python" tests
        export TS_TEST_DAEMON=$at/bin/tinyserved TS_TEST_TSCTL=$at/bin/tsctl
        # Not what is about the tree, nor three that give a program's copy to another user.
        timeout 600 "$at/bin/python" -m pytest -q -p no:cacheprovider tests \
            --ignore tests/test_history.py --ignore tests/test_package.py \
            --deselect tests/test_page.py::test_a_tenant_is_shown_its_own_and_totals \
            --deselect tests/test_doctor.py::$refused \
            --deselect tests/test_cache_reports.py::$copies >"$scratch/log" 2>&1 || {
            tail -n 60 "$scratch/log"
            exit 1
        }
        tail -n 1 "$scratch/log"
        rm -rf tests
    )
    block c >"$scratch/worker.c"
    cc -Wall -Wextra -Werror "$scratch/worker.c" -I"$native/include" \
        "$native/lib/libtinyserve.so.0" -Wl,-rpath,"$native/lib" -o "$scratch/worker"
    export TINYSERVE_URL=$scratch/s
    "$at/bin/tinyserved" --socket "$TINYSERVE_URL" --set log_level=warning --pool "$pool" &
    daemon=$!
    "$at/bin/tsctl" --wait 60 status >/dev/null
    "$scratch/worker"
    "$at/bin/tsctl" status | grep -q '^  tokens  *5 ' || fail "the worker in C left no tokens"
    kill "$daemon" # the command has become the daemon
    wait "$daemon"
    daemon=
    unset TINYSERVE_URL
}

if [ "$(id -u)" -eq 0 ] && command -v debootstrap >/dev/null; then
    in_a_bare_root
else
    echo "skipped: a bare root needs root and debootstrap"
fi
found=$(pythons)
[ -n "$found" ] || fail "there is no Python 3.9 or later with venv"
for python in $( (head -n 1 <<<"$found" && tail -n 1 <<<"$found") | cut -d ' ' -f 2 | uniq); do
    with_python "$python"
done
