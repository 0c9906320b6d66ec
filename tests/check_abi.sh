#!/usr/bin/env bash
# check_abi.sh LIBRARY: whether programs that were linked to the last release's libtinyserve can use
# LIBRARY, which has debug information. What its binary interface was then (functions, and the types
# that the public headers show) is in tests/abi/; functions may come, nothing else may change.
# check_abi.sh --renew LIBRARY makes LIBRARY's interface the one to compare with.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
baseline=$root/tests/abi/libtinyserve.abi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

interface() { # LIBRARY FILE
    mkdir "$scratch/include"
    cp "$root"/client/include/*.h "$root/kernels/base/tinyserve_types.h" "$scratch/include"
    abidw --headers-dir "$scratch/include" --drop-private-types --drop-undefined-syms \
        --type-id-style hash --no-show-locs --no-write-default-sizes --no-corpus-path \
        --no-comp-dir-path --no-parameter-names --out-file "$2" "$1"
    sed -i "s#path='$root/#path='#" "$2" # wherever the checkout is
}

if [ "$1" = --renew ]; then
    interface "$2" "$baseline"
    echo "$baseline: $(wc -c <"$baseline") bytes"
else
    interface "$1" "$scratch/now.abi"
    abidiff --no-added-syms "$baseline" "$scratch/now.abi"
    echo "$(grep -c '<elf-symbol ' "$baseline") functions, and their types, are as they were"
fi
