#!/usr/bin/env bash
# All C code for 64-bit ARM: cross-compiled, against Debian's libraries, and run by an emulator.
#   check_arm.sh         the service, the library and the tools compile; the processor's kernels
#                        match their references
#   check_arm.sh suite   and what of the C suite an emulator can run passes
# Exits with 77 where such libraries can't be had. A GPU's kernels aren't part of it.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/common.sh
folder=$PWD/build-arm
export TS_SYSROOT=$folder/sysroot
install_packages gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static || {
    echo "skipped: there is no compiler for 64-bit ARM here, or no emulator"
    exit 77
}

# The libraries, unpacked: this system's packages stay as they are.
fetch_libraries() {
    local state=$folder/apt package
    rm -rf "$state"
    mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
    : >"$state/status"
    cat >"$state/apt.conf" <<END
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "root";
APT::Install-Recommends "false";
Dir::State::Lists "$state/lists";
Dir::State::status "$state/status";
Dir::Cache "$state/cache";
END
    APT_CONFIG=$state/apt.conf apt-get -qq update &&
        APT_CONFIG=$state/apt.conf apt-get -qq -y --download-only install libc6-dev libnng-dev \
            libprotobuf-c-dev libinih-dev libjansson-dev libxxhash-dev libsystemd-dev \
            libncurses-dev libmicrohttpd-dev libcmocka-dev >/dev/null || return 1
    for package in "$state"/cache/archives/*.deb; do
        dpkg-deb -x "$package" "$TS_SYSROOT.part" || return 1
    done
    rm -rf "$state"
    mv "$TS_SYSROOT.part" "$TS_SYSROOT"
}

if [ ! -d "$TS_SYSROOT" ]; then
    rm -rf "$TS_SYSROOT.part"
    fetch_libraries || {
        echo "skipped: Debian's libraries for 64-bit ARM can't be had here"
        exit 77
    }
fi
export PKG_CONFIG_SYSROOT_DIR=$TS_SYSROOT
export PKG_CONFIG_LIBDIR=$TS_SYSROOT/usr/lib/aarch64-linux-gnu/pkgconfig
build_target="tinyserved tsctl tsbench tinyserve test_attention"
[ "${1:-}" = suite ] && build_target=
configure_and_build "$folder" -DCMAKE_TOOLCHAIN_FILE="$PWD/tests/aarch64.cmake" \
    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DBUILD_TESTING=ON -DTS_WERROR=ON -DTS_CUDA=OFF
if [ "${1:-}" = suite ]; then
    ctest --test-dir "$folder" --output-on-failure --timeout 600 -j 2 -L emulated
else
    qemu-aarch64-static -L "$TS_SYSROOT" "$folder/tests/test_attention" 'every_*' || exit 1
fi
