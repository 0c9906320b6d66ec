#!/bin/sh
# README's two workers compile and run as they stand there, against a daemon with a small pool of
# the name that they ask for.
# check_readme.sh SOURCE-FOLDER BUILD-FOLDER PYTHON
set -eu
folder=$(mktemp -d)
daemon=
# shellcheck disable=SC2154
trap 'status=$?; [ -z "$daemon" ] || kill "$daemon" 2>/dev/null || true; wait
    rm -rf "$folder"; exit $status' EXIT
block() { # the first block of this language
    awk -v start="^\`\`\`$1\$" '
        !done && $0 ~ start { on = 1; next }
        /^```$/ && on { on = 0; done = 1 }
        on' "$2"
}
block c "$1/README.md" >"$folder/worker.c"
block python "$1/README.md" >"$folder/worker.py"
[ "$(wc -l <"$folder/worker.c")" -le 45 ] && [ "$(wc -l <"$folder/worker.py")" -le 15 ]
cc -std=c99 -Wall -Wextra -Werror "$folder/worker.c" \
    -I"$1/client/include" -I"$1/kernels/base" -I"$2/include" \
    -L"$2/client" -ltinyserve -Wl,-rpath,"$2/client" -o "$folder/worker"
export TINYSERVE_URL="$folder/s"
"$2/daemon/tinyserved" --socket "$TINYSERVE_URL" --set log_level=warning \
    --pool llama-8b:layers=2,kv_heads=2,head_dim=64,dtype=bf16,memory=8M,device=host &
daemon=$!
tokens() {
    "$2/tools/tsctl" --wait 60 status | sed -n 's/^  tokens *\([0-9]*\).*/\1/p'
}
[ "$(tokens "$@")" = 0 ]
"$folder/worker"
[ "$(tokens "$@")" = 5 ]
TINYSERVE_LIBRARY=$2/client/libtinyserve.so.0 PYTHONPATH=$1/client/python \
    PYTHONDONTWRITEBYTECODE=1 "$3" "$folder/worker.py"
[ "$(tokens "$@")" = 10 ]
kill "$daemon"
wait "$daemon"
daemon=
