#!/usr/bin/env bash
# check_exports.sh LIBRARY SOURCE: the functions that the library exports are those that its public
# headers declare; and whoever ignores a status is warned, but for the one that may be ignored.
set -euo pipefail
include=$2/client/include
headers="$include/tinyserve.h $include/tinyserve_sequences.h $2/kernels/base/tinyserve_types.h"
# shellcheck disable=SC2086 # three words
ignorable=$(grep -hE '^ts_status ts_' $headers)
[ "$ignorable" = "ts_status ts_step_abort(ts_step *step);" ] || { echo "$ignorable"; exit 1; }
declared=$(sed 's:/\*.*\*/::' "$2"/client/include/*.h "$2/kernels/base/tinyserve_types.h" |
    grep -v 'static inline' | grep -oE '\bts_[a-z0-9_]+\(' | tr -d '(' | sort -u)
inline=$(grep -hoE 'static inline .*\bts_[a-z0-9_]+\(' "$2/kernels/base/tinyserve_types.h" |
    grep -oE 'ts_[a-z0-9_]+\($' | tr -d '(' | sort -u)
exported=$(nm -D --defined-only "$1" | awk '$2 == "T" {print $3}' | sed 's/@.*//' | sort -u)
diff <(comm -23 <(echo "$declared") <(echo "$inline")) <(echo "$exported") &&
    ! nm -D --defined-only "$1" | awk '$2 != "T" && $2 != "A" {print; found = 1} END {exit !found}'
