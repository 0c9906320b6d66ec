#!/bin/sh
# The units are what systemd understands, and expose no more than they say: systemd/monitoring.md
# has the figures.
# check_units.sh FOLDER-OF-UNITS TINYSERVED
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for unit in tinyserved.service tinyserved@.service; do
    sed "s#/usr/sbin/tinyserved#$2#" "$1/$unit" >"$folder/$unit"
done
cp "$folder/tinyserved@.service" "$folder/tinyserved@0.service"
cd "$folder"
warnings=$(SYSTEMD_LOG_LEVEL=warning systemd-analyze verify --man=no \
    ./tinyserved.service ./tinyserved@0.service 2>&1)
# A key that systemd has from 254 on; what is older says so, and goes on without.
if [ "$(systemd-analyze --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')" -lt 254 ]; then
    warnings=$(echo "$warnings" |
        sed "/Unknown key .*'FileDescriptorStorePreserve' in .*ignoring/d")
fi
if [ -n "$warnings" ]; then
    echo "$warnings"
    exit 1
fi
systemd-analyze security --offline=yes --threshold=20 ./tinyserved.service | tail -1
systemd-analyze security --offline=yes --threshold=20 ./tinyserved@0.service | tail -1
# tail's status is not systemd-analyze's
systemd-analyze security --offline=yes --threshold=20 ./tinyserved.service >/dev/null
systemd-analyze security --offline=yes --threshold=20 ./tinyserved@0.service >/dev/null
if command -v systemd-sysusers >/dev/null; then
    systemd-sysusers --dry-run "$1/tinyserve.sysusers" >/dev/null 2>&1 ||
        systemd-sysusers --root="$folder" "$1/tinyserve.sysusers"
    systemd-tmpfiles --root="$folder" --cat-config "$1/tinyserve.tmpfiles" >/dev/null
fi
