#!/usr/bin/env python3
"""Shows how the figures of `tsbench --json` went over time, and where the last one is worse.

Reads the files of a folder (json/ beside this program), each DATE-MACHINE-BENCHMARK.json, and
groups them by machine: the processor's name and the number of processors. A figure's last value is
held against the median of the earlier ones of the same machine. Ends with 1 if any is worse by more
than the given percentage, and with 2 if a file isn't a result."""

import argparse
import collections
import json
import pathlib
import re
import statistics
import sys

NAME = re.compile(r"\d{4}-\d{2}-\d{2}-(?P<machine>[a-z0-9_]+)-(?P<benchmark>[a-z]+)\.json")

#: what is shown of a row: (its key, and whether more is better; None: never worse). The first that
#: matches counts. "value" goes by its unit.
FIGURES = [
    (re.compile(r"(read|echo)_.*"), None),  # the machine itself, measured in the same run
    (re.compile(r".*GB_s|TFLOP_s|.*per_s|blocks_per_second_.*|ratio"), True),
    (re.compile(r"ms|us|us_least|.*_us|p50_ratio"), False),
    (re.compile(r"us_floor"), None),
]
UNITS = {"µs": False, "/s": True}


#: a load average above which others used the machine: its figures are marked
BUSY = 0.5


class NotAResult(Exception):
    """The file isn't what tsbench --json writes, or isn't named as the folder's files are."""


def more_is_better(key, row):
    """True, False, or None for a figure that is never worse; KeyError: `key` is no figure."""
    if key == "value":
        return None if row["what"].startswith("bare ") else UNITS[row["unit"]]
    for pattern, direction in FIGURES:
        if pattern.fullmatch(key):
            return direction
    raise KeyError(key)


def read_result(path):
    """(machine, date, whether it was busy, {(benchmark, row, figure): (value, whether more is
    better)})"""
    name = NAME.fullmatch(path.name)
    if name is None:
        raise NotAResult(f"{path}: the name isn't DATE-MACHINE-BENCHMARK.json")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        benchmark, date = result["benchmark"], result["date"]
        machine = "{processor}, {processors} processors".format_map(result["machine"])
        busy = result["machine"]["load_before"] > BUSY
        rows = result["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise NotAResult(f"{path}: not what tsbench --json writes: {error!r}") from error
    if benchmark != name["benchmark"] or not path.name.startswith(date[:10]):
        raise NotAResult(f"{path}: it is of {benchmark} on {date[:10]}")
    figures = {}
    for row in rows:
        named = " ".join(v if isinstance(v, str) else f"{k}={v}" for k, v in row.items()
                         if k != "unit" and not isinstance(v, float))
        for key, value in row.items():
            if isinstance(value, float):
                try:
                    better = more_is_better(key, row)
                except KeyError:
                    continue
                figure = row["unit"] if key == "value" else key
                figures[benchmark, named, figure] = (value, better)
    return machine, date, busy, figures


def read_folder(folder):
    """{machine: {figure: [(date, busy, value, whether more is better)] by date}}"""
    machines = collections.defaultdict(lambda: collections.defaultdict(list))
    for path in sorted(folder.glob("*.json")):
        machine, date, busy, figures = read_result(path)
        for figure, (value, better) in figures.items():
            machines[machine][figure].append((date, busy, value, better))
    for figures in machines.values():
        for points in figures.values():
            points.sort(key=lambda point: point[0])
    return machines


def worsening(points):
    """By how many percent the last value is worse than the median of the earlier ones; or 0."""
    *earlier, (_, _, last, better) = points
    if not earlier or better is None:
        return 0
    usual = statistics.median(value for _, _, value, _ in earlier)
    ratio = usual / last if better else last / usual
    return max(0, (ratio - 1) * 100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path,
                        default=pathlib.Path(__file__).parent / "json")
    parser.add_argument("--worse", type=float, default=15, metavar="PERCENT",
                        help="tell of figures that are worse by more than this (default 15)")
    options = parser.parse_args()
    try:
        machines = read_folder(options.folder)
    except NotAResult as error:
        print(f"history.py: {error}", file=sys.stderr)
        return 2
    found = 0
    for machine, figures in sorted(machines.items()):
        print(machine)
        for (benchmark, named, figure), points in figures.items():
            print(f"  {benchmark}: {named}: {figure}")
            print("    " + "  ".join(f"{date[:10]} {value:.5g}{'*' * busy}"
                                     for date, busy, value, _ in points))
            worse = worsening(points)
            if worse > options.worse:
                print(f"    WORSE by {worse:.0f} %")
                found += 1
    print(f"{found} figures are worse by more than {options.worse:g} %"
          " (*: the machine was busy before the run)")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
