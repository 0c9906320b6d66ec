"""The original's memory-manager scenario with its exact values, on the GPU: blocks of 4 tokens; 5
tokens take blocks [0, 1], 3 more take none, 1 more takes block 2; the 4th token's slot is 3, its
row is where it must be and the other rows are still 0. The contents are read back through the
mapping of a second process."""

import subprocess
import sys

import common
import tinyserve
import torch

READER = """
import sys, tinyserve, torch
with tinyserve.connect(sys.argv[1]) as client, client.pool("m") as kv:
    seq, length = kv.attach("nine")
    slots = kv.slots(seq, 0, length)
    keys, values = kv.layer(0, slots)
    k, v = keys.torch().cpu(), values.torch().cpu()
    print(slots)
    for block in range(3):
        for row in range(4):
            print(block, row, k[block, row, 0, 0].item(), k[block, row].unique().numel(),
                  v[block, row].abs().max().item())
"""


def main():
    options = common.arguments(__doc__).parse_args()
    pool = (f"m:layers=1,kv_heads=2,head_dim=64,dtype=fp32,block_tokens=4,blocks=16,"
            f"client_write=all,device={options.device},provider={options.provider}")
    rows = []

    def expect(what, value, wanted):
        rows.append([what, value, "PASS" if value == wanted else f"FAIL: {wanted}"])

    with common.Daemon(pool) as daemon, tinyserve.connect(daemon.url) as client, \
            client.pool("m", writable=True) as kv:
        seq, = kv.create()
        slots = kv.append([seq], [5])
        expect("5 tokens take blocks", sorted({s // 4 for s in slots}), [0, 1])
        expect("slot of the 4th token", slots[3], 3)
        more = kv.append([seq], [3])
        expect("3 more take", sorted({s // 4 for s in more} - {s // 4 for s in slots}), [])
        last = kv.append([seq], [1])
        expect("1 more takes block", [s // 4 for s in last], [2])
        key, _ = kv.kv(slots[3], 0)
        key.torch().fill_(42.0)
        torch.cuda.synchronize()
        kv.keep(seq, "nine")
        printed = subprocess.run([sys.executable, "-c", READER, daemon.url], check=True, text=True,
                                 stdout=subprocess.PIPE).stdout.splitlines()
        expect("slots, read by a second process", printed[0], str(list(range(9))))
        wrong = [line for line in printed[1:]
                 if line.split() != [*line.split()[:2], "42.0" if line.split()[:2] == ["0", "3"]
                                     else "0.0", "1", "0.0"]]
        expect("rows of 3 blocks that are not as they must be", len(wrong), 0)
        expect("... of so many read back", len(printed) - 1, 12)
    print(f"memory manager, {kv.memory}, {common.device_line()}\n")
    common.table(["", "value", ""], rows)
    return any("FAIL" in row[2] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
