# What tools/demo and tools/test share: installing what is missing, building, and cleaning up.
# Sourced by bash with the repository's root as working directory.

# show_usage FILE: what the head of a script says of it.
show_usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"; }

say() { printf '\n== %s\n' "$*"; }

# Installs the named packages that are not there yet, through apt, as root or with sudo.
install_packages() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f '${Status}\n' "$package" 2>/dev/null | grep -q '^install ok installed' ||
            missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    say "installing ${missing[*]}"
    local sudo=()
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

build_packages() {
    install_packages gcc libc6-dev cmake ninja-build pkg-config libnng-dev libprotobuf-c-dev \
        protobuf-c-compiler libinih-dev libjansson-dev libxxhash-dev libsystemd-dev libncurses-dev \
        libmicrohttpd-dev
}

# configure_and_build FOLDER [CMake options]: quiet unless it fails. Builds $build_target, or all. A
# developer's folder keeps its compilers' launcher: with another one all would be built anew. Every
# folder keeps its generator, since CMake refuses another one.
configure_and_build() (
    folder=$1
    keeping=()
    generator=()
    shift
    [ -e "$folder/CMakeCache.txt" ] || generator=(-G Ninja)
    export CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}" # for make
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT # however it ends
    trap 'exit 130' INT TERM HUP
    if grep -qs '^TS_WERROR:BOOL=ON' "$folder/CMakeCache.txt"; then
        keeping=(env -u CMAKE_C_COMPILER_LAUNCHER -u CMAKE_CUDA_COMPILER_LAUNCHER)
    fi
    # shellcheck disable=SC2086 # targets are words
    if ! {
        "${keeping[@]}" cmake -S . -B "$folder" "${generator[@]}" "$@" &&
            cmake --build "$folder" --target ${build_target:-all}
    } >"$log" 2>&1; then
        cat "$log"
        exit 1
    fi
)

# A folder that goes when the script ends, however it does; what runs in the background goes too.
make_scratch() {
    scratch=$(mktemp -d /tmp/tinyserve.XXXXXX)
    trap clean_up EXIT
    trap 'exit 130' INT TERM HUP
}

clean_up() {
    local pids
    trap - EXIT INT TERM HUP
    pids=$(jobs -p)
    [ -z "$pids" ] || kill $pids 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$scratch"
}

# What to compile CUDA kernels for where the build is for this machine's GPU alone; nothing
# without one.
cuda_architecture() {
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
        head -n 1 | tr -d .) || true
    case $capability in
    90) echo 90a-real ;;
    [0-9]*) echo "$capability-real" ;;
    esac
}
