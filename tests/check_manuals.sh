#!/bin/bash
# The manual pages are clean, and name every option that there is; tsctl's completion offers them.
# check_manuals.sh SOURCE-FOLDER TSCTL TINYSERVED TSBENCH TS-GENERATE
set -euo pipefail
cd "$1"
mandoc -T lint -W warning tools/*/*.1 daemon/tinyserved.8 systemd/tinyserved.conf.5 client/man/*.3
fail() { echo "$*"; exit 1; }
options() {
    "$1" --help | grep -oE -- '--[a-z-]+' | grep -vE -- '--(help|usage|version)' | sort -u
}
. tools/tsctl/tsctl.bash
COMP_WORDS=(tsctl --) COMP_CWORD=1
_tsctl
for option in $(options "$2"); do
    grep -q -- "Fl -${option#--}" tools/tsctl/tsctl.1 || fail "tsctl.1 has no $option"
    [[ " ${COMPREPLY[*]} " == *" $option "* ]] || fail "the completion has no $option"
done
has_all() { # PROGRAM PAGE
    local option
    for option in $(options "$1"); do
        grep -qE -- "Fl -${option#--}( |$)" "$2" || fail "$2 has no $option"
    done
}
has_all "$3" daemon/tinyserved.8
has_all "$4" tools/tsbench/tsbench.1
has_all "$5" tools/generate/ts-generate.1
for benchmark in $("$4" --help | sed -n '/^Benchmarks:/,/^$/s/^  \([a-z]*\) .*/\1/p'); do
    grep -qE "^\.It Cm $benchmark\$" tools/tsbench/tsbench.1 || fail "tsbench.1 has no $benchmark"
done
COMP_WORDS=(tsctl s) COMP_CWORD=1
_tsctl
[ "${COMPREPLY[*]}" = "status sessions seqs session seq" ]
for command in $("$2" --help | sed -n '/^Commands:/,/^$/s/^  \([a-z]*\) .*/\1/p'); do
    grep -qE "^\.It Cm $command( |\$)" tools/tsctl/tsctl.1 || fail "tsctl.1 has no $command"
done
# Types of elements are offered, and told of.
COMP_WORDS=(tsctl plan --dtype '') COMP_CWORD=3
_tsctl
dtypes=$(sed -n 's/^ *\[TS_DTYPE_[A-Z0-9_]*\] = {"\([a-z0-9_]*\)".*/\1/p' kernels/base/dtypes.c)
[ "$(printf '%s\n' "${COMPREPLY[@]}" | sort)" = "$(sort <<<"$dtypes")" ] ||
    fail "the completion has other types than $(xargs <<<"$dtypes")"
for dtype in $dtypes; do
    grep -q "^\.Qq $dtype\b" client/man/ts_geometry_check.3 || fail "ts_geometry_check.3: $dtype"
done
# Every function that libtinyserve exports has a page that names it, and shows how it is called.
declared=$(grep -ohE '\bts_[a-z0-9_]+\(' client/include/*.h kernels/base/tinyserve_types.h |
    tr -d '(' | sort -u)
named=$(sed -n '/^\.Sh NAME/,/^\.Nd/s/^\.Nm \(ts_[a-z0-9_]*\).*/\1/p' client/man/*.3)
shown=$(sed -n '/^\.Sh SYNOPSIS/,/^\.Sh DESC/s/^\.Fo \(ts_[a-z0-9_]*\)/\1/p' client/man/*.3)
[ "$named" = "$shown" ] ||
    fail "NAME and SYNOPSIS differ: $(diff <(echo "$named") <(echo "$shown"))"
twice=$(echo "$named" | sort | uniq -d)
[ -z "$twice" ] || fail "in two pages: $twice"
for name in $named; do
    grep -qx "$name" <<<"$declared" || fail "no header declares $name, which a page names"
done
for pattern in $(sed -n 's/^ *\(ts_[a-z0-9_*]*\);$/\1/p' client/tinyserve.map); do
    found=
    for name in $declared; do
        # shellcheck disable=SC2053
        [[ $name == $pattern ]] || continue
        found=yes
        grep -qx "$name" <<<"$named" || fail "no page of client/man names $name"
    done
    [ -n "$found" ] || fail "tinyserve.map has $pattern, which no header declares"
done
