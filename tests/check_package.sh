#!/bin/sh
# A program outside this tree builds against what is installed, by pkg-config as C99 and by CMake,
# and the header is C++17 too.
# check_package.sh BUILD-FOLDER CMAKE LIBDIR
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$2" --install "$1" --prefix "$folder/there" >"$folder/log" 2>&1 || {
    cat "$folder/log"
    exit 1
}
says_nothing_is_wrong() {
    ! grep -A 8 "^CMake .*Warning" "$folder/log"
}
says_nothing_is_wrong
# Workers map it: without debug information it stays small.
strip -o "$folder/stripped" "$folder/there/$3/libtinyserve.so"
bytes=$(stat -c %s "$folder/stripped")
[ "$bytes" -le 2097152 ] || {
    echo "libtinyserve.so has $bytes bytes, more than 2 MiB"
    exit 1
}
cat >"$folder/worker.c" <<'END'
#include <stdio.h>
#include <string.h>
#include <tinyserve.h>

int main(void)
{
    ts_client *client;
    ts_options options = TS_OPTIONS_INIT;
    if (strcmp(ts_version(), TS_VERSION) != 0 || ts_struct_bytes("ts_options") != sizeof options)
        return 2;
    options.url = "/nowhere/at/all";
    ts_status status = ts_connect(&options, &client);
    printf("%s: %s\n", ts_status_name(status), ts_error(client));
    int wrong = status != TS_ECONN || strstr(ts_error(client), "is tinyserved running?") == NULL;
    ts_disconnect(client);
    return wrong;
}
END
# Where it was installed, and where it is moved to then.
by_pkg_config() {
    flags=$(PKG_CONFIG_PATH="$folder/$1/$2/pkgconfig" pkg-config --cflags --libs tinyserve)
    # shellcheck disable=SC2086
    cc -std=c99 -pedantic -Wall -Wextra -Werror "$folder/worker.c" $flags -o "$folder/worker"
    LD_LIBRARY_PATH="$folder/$1/$2" "$folder/worker"
}
by_pkg_config there "$3"
mv "$folder/there" "$folder/moved"
by_pkg_config moved "$3"
mv "$folder/moved" "$folder/there"
# Who ignores a status is told.
sed 's/ts_status status = ts_connect/ts_status status = TS_ECONN;\
    ts_connect/' "$folder/worker.c" >"$folder/careless.c"
if cc -Werror=unused-result -c -o "$folder/careless.o" -I"$folder/there/include" \
    "$folder/careless.c" 2>"$folder/log" ||
    ! grep -q "ignoring return value of .ts_connect" "$folder/log"; then
    cat "$folder/log"
    exit 1
fi
export PKG_CONFIG_PATH="$folder/there/$3/pkgconfig"
echo "version $(pkg-config --modversion tinyserve) by pkg-config"

cat >"$folder/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.22)
project(outside C)
find_package(TinyServe 0.1 REQUIRED)
add_executable(worker worker.c)
target_link_libraries(worker PRIVATE TinyServe::tinyserve)
END
"$2" -S "$folder" -B "$folder/build" -G Ninja -DCMAKE_PREFIX_PATH="$folder/there" \
    >"$folder/log" 2>&1 &&
    "$2" --build "$folder/build" >>"$folder/log" 2>&1 || {
    cat "$folder/log"
    exit 1
}
"$folder/build/worker"
if command -v g++ >/dev/null; then
    cat >"$folder/worker.cpp" <<'EOF'
#include <tinyserve.h>
int main()
{
    ts_options o = TS_OPTIONS_INIT;
    ts_step_options s = TS_STEP_OPTIONS_INIT;
    ts_run_options r = TS_RUN_OPTIONS_INIT;
    ts_frame_options f = TS_FRAME_OPTIONS_INIT;
    return (int)(o.size + s.size + r.size + f.size);
}
EOF
    g++ -std=c++17 -pedantic -Wall -Wextra -Werror -I"$folder/there/include" -fsyntax-only \
        "$folder/worker.cpp"
    echo "the header is C++17"
else
    echo "whether the header is C++17 wasn't checked: there is no g++"
fi

# Below /usr the configuration goes to /etc, and one that is there stays.
install_to_usr() {
    DESTDIR="$folder/root" "$2" --install "$1" --prefix /usr >"$folder/log" 2>&1 || {
        cat "$folder/log"
        exit 1
    }
    says_nothing_is_wrong
}
[ -f "$folder/there/etc/tinyserve/tinyserved.conf" ]
install_to_usr "$1" "$2"
[ ! -e "$folder/root/usr/etc" ]
echo '# mine' >>"$folder/root/etc/tinyserve/tinyserved.conf"
install_to_usr "$1" "$2"
grep -q '# mine' "$folder/root/etc/tinyserve/tinyserved.conf"
