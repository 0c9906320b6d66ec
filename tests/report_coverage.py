#!/usr/bin/env python3
"""How many lines of each folder the suite has run, by gcovr, in a build of the preset `coverage`.
What is compiled for a GPU alone isn't counted.
report_coverage.py build-coverage"""

import collections
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Two threads that count one line at a time may leave a negative count, which gcovr would refuse.
gcovr = subprocess.run(
    ["gcovr", "--root", ROOT, sys.argv[1], "--gcov-ignore-parse-errors", "-j", "2",
     "--filter", "client/", "--filter", "daemon/", "--filter", "proto/",
     "--filter", "kernels/(base|cpu|memory)/", "--json-summary", "-"],
    check=False, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
if gcovr.returncode != 0:
    sys.exit(gcovr.stderr.decode())
folders = collections.defaultdict(lambda: [0, 0])
for file in json.loads(gcovr.stdout)["files"]:
    for folder in os.path.dirname(file["filename"]), "all":
        folders[folder][0] += file["line_covered"]
        folders[folder][1] += file["line_total"]
for folder, (covered, lines) in sorted(folders.items(), key=lambda f: (f[0] == "all", f[0])):
    print(f"{folder:20} {covered:6} of {lines:6} lines  {100 * covered / max(lines, 1):5.1f} %")
sys.exit(not folders)
