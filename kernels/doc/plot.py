#!/usr/bin/env python3
"""Draws what tests/gpu/bench_peers.py --json has measured, as an SVG file that needs nothing else.

    python3 kernels/doc/plot.py peers.json peers.svg

What memory bounds: bytes per second as a share of the plain read rate; what arithmetic does:
TFLOP/s.
"""

import json
import sys
from html import escape

COLORS = {"ours": "#2563eb", "flashinfer": "#f59e0b", "sdpa cudnn": "#10b981",
          "sdpa flash": "#a78bfa", "fa3": "#ef4444"}
LEFT, BAR, GAP, WIDTH = 300, 13, 16, 560


def panel(out, top, title, shapes, value, limit, text):
    """One bar for each shape and kernel; returns where the panel ends."""
    out.append(f'<text x="{LEFT}" y="{top}" class="title">{escape(title)}</text>')
    top += 12
    for shape in shapes:
        bars = {"ours": shape["us"], **{k: v for k, v in shape["peers_us"].items() if v}}
        middle = top + len(bars) * BAR / 2 + 4
        out.append(f'<text x="{LEFT - 8}" y="{middle:.0f}" text-anchor="end">'
                   f'{escape(shape["shape"])}</text>')
        for who, us in bars.items():
            x = value(shape, us)
            out.append(f'<rect x="{LEFT}" y="{top}" width="{x / limit * WIDTH:.1f}" '
                       f'height="{BAR - 2}" fill="{COLORS[who]}"><title>{who}: {us:.1f} µs'
                       f'</title></rect>')
            out.append(f'<text x="{LEFT + x / limit * WIDTH + 4:.1f}" y="{top + BAR - 3}" '
                       f'class="small">{text(x)}</text>')
            top += BAR
        top += GAP
    return top + 10


def draw(data):
    arithmetic = [s for s in data["shapes"] if s["TFLOP_s"] > 200]
    memory = [s for s in data["shapes"] if s not in arithmetic]
    out = []
    x = LEFT
    measured = {"ours"} | {k for s in data["shapes"] for k, us in s["peers_us"].items() if us}
    for who, color in ((k, c) for k, c in COLORS.items() if k in measured):
        out.append(f'<rect x="{x}" y="34" width="12" height="12" fill="{color}"/>'
                   f'<text x="{x + 17}" y="44">{who}</text>')
        x += 110
    end = panel(out, 80, "bound by memory: of the plain read rate (longer is better)", memory,
                lambda s, us: s["ratio"] * s["us"] / us, 1.0, lambda x: f"{x:.2f}")
    most = max((s["TFLOP_s"] * s["us"] / us for s in arithmetic
                for us in [s["us"], *filter(None, s["peers_us"].values())]), default=1)
    end = panel(out, end + 14, "bound by arithmetic: TFLOP/s (longer is better)", arithmetic,
                lambda s, us: s["TFLOP_s"] * s["us"] / us, most, lambda x: f"{x:.0f}")
    peers = [f'torch {data["torch"]}'] + \
        [f"{peer} {data[peer]}" for peer in ("flashinfer", "fa3") if data.get(peer)]
    head = ", ".join([data["device"], *peers])
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 60}" height="{end}" '
            f'font-family="sans-serif" font-size="12"><style>.title{{font-weight:bold}}'
            f'.small{{font-size:10px}}</style><rect width="100%" height="100%" fill="white"/>'
            f'<text x="{LEFT}" y="22">{escape(head)}</text>' + "\n".join(out) + "</svg>\n")


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with open(sys.argv[1], encoding="utf-8") as file:
        data = json.load(file)
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        file.write(draw(data))


if __name__ == "__main__":
    main()
