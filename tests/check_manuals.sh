#!/bin/bash
# The manual pages are clean, and name every option that there is; tsctl's completion offers them.
# check_manuals.sh SOURCE-FOLDER TSCTL TINYSERVED
set -euo pipefail
cd "$1"
mandoc -T lint -W warning tools/tsctl/tsctl.1 daemon/tinyserved.8 systemd/tinyserved.conf.5 client/man/*.3
options() { "$1" --help | grep -oE -- '--[a-z-]+' | grep -vE -- '--(help|usage|version)' | sort -u; }
. tools/tsctl/tsctl.bash
COMP_WORDS=(tsctl --) COMP_CWORD=1
_tsctl
for option in $(options "$2"); do
    grep -q -- "Fl -${option#--}" tools/tsctl/tsctl.1 || { echo "tsctl.1 has no $option"; exit 1; }
    [[ " ${COMPREPLY[*]} " == *" $option "* ]] || { echo "the completion has no $option"; exit 1; }
done
for option in $(options "$3"); do
    grep -q -- "Fl -${option#--}" daemon/tinyserved.8 || { echo "tinyserved.8 has no $option"; exit 1; }
done
COMP_WORDS=(tsctl s) COMP_CWORD=1
_tsctl
[ "${COMPREPLY[*]}" = "status sessions seqs session seq" ]
for command in $("$2" --help | sed -n '/^Commands:/,/^$/s/^  \([a-z]*\) .*/\1/p'); do
    grep -qE "^\.It Cm $command( |\$)" tools/tsctl/tsctl.1 || { echo "tsctl.1 has no $command"; exit 1; }
done
# Every function that libtinyserve exports has a page that names it, and shows how it is called.
declared=$(grep -ohE '\bts_[a-z0-9_]+\(' client/include/tinyserve.h kernels/base/tinyserve_types.h | tr -d '(' | sort -u)
named=$(sed -n '/^\.Sh NAME/,/^\.Nd/s/^\.Nm \(ts_[a-z0-9_]*\).*/\1/p' client/man/*.3)
shown=$(sed -n '/^\.Sh SYNOPSIS/,/^\.Sh DESC/s/^\.Fo \(ts_[a-z0-9_]*\)/\1/p' client/man/*.3)
[ "$named" = "$shown" ] || { diff <(echo "$named") <(echo "$shown"); echo "NAME and SYNOPSIS differ"; exit 1; }
[ -z "$(echo "$named" | sort | uniq -d)" ] || { echo "$named" | sort | uniq -d; echo "in two pages"; exit 1; }
for name in $named; do
    grep -qx "$name" <<<"$declared" || { echo "no header declares $name, which a page names"; exit 1; }
done
for pattern in $(sed -n 's/^ *\(ts_[a-z0-9_*]*\);$/\1/p' client/tinyserve.map); do
    found=
    for name in $declared; do
        # shellcheck disable=SC2053
        [[ $name == $pattern ]] || continue
        found=yes
        grep -qx "$name" <<<"$named" || { echo "no page of client/man names $name"; exit 1; }
    done
    [ -n "$found" ] || { echo "tinyserve.map has $pattern, which no header declares"; exit 1; }
done
