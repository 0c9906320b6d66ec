#!/usr/bin/env python3
"""Has Clang look at every C file that a build compiles, with glibc's checks of results
(_FORTIFY_SOURCE): warnings are errors. Generates no code, so it takes seconds.
check_clang.py build/compile_commands.json"""

import concurrent.futures
import json
import os
import shlex
import subprocess
import sys

CLANG = os.environ.get("CLANG", "clang-14")


def look(entry):
    words = [w for w in shlex.split(entry["command"]) if not w.endswith("ccache")][1:]
    out = words.index("-o")
    words[out:out + 2] = []
    words[words.index("-c")] = "-fsyntax-only"
    return subprocess.run(
        [CLANG, *words, "-O2", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=3", "-Werror",
         "-Wno-cast-qual"],  # GCC's: Clang complains of protobuf-c's initialisers, too
        cwd=entry["directory"], check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True)


with open(sys.argv[1], encoding="utf-8") as file:
    entries = [e for e in json.load(file) if e["file"].endswith(".c")]
with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    failed = [r.stdout for r in pool.map(look, entries) if r.returncode != 0]
print("".join(failed), end="")
print(f"{len(entries)} files, {len(failed)} with complaints")
sys.exit(bool(failed) or not entries)
