#!/usr/bin/env python3
"""Finds lines of more than 100 characters in the files of the repository that people read.

Ends with 1 if there are any."""

import pathlib
import subprocess
import sys

MOST = 100

#: what isn't read line by line: data, pictures, and what other programs write or prescribe
EXCEPTIONS = ("*.bin", "*.json", "*.png", "*.safetensors", "*.svg", "tools/model/prefix.txt",
              ".git-blame-ignore-revs", "tests/abi/*.abi", "tests/fuzz/corpus/*/*")


def main(root):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, text=True,
                            capture_output=True).stdout
    found = 0
    for name in listed.split("\0")[:-1]:
        path = pathlib.Path(root, name)
        if any(pathlib.PurePath(name).match(pattern) for pattern in EXCEPTIONS):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if len(line) > MOST:
                print(f"{name}:{number}: {len(line)} characters; the limit is {MOST}")
                found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "."))
