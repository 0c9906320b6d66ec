#!/usr/bin/env python3
"""cuda_stubs.py FOLDER...: makes PyPI's torch importable on a machine without a GPU, without the
2.5 GB of CUDA libraries that it links and, on a processor, never calls.

FOLDERs have shared libraries (torch/lib). For each CUDA library that one of them needs and that
isn't installed, a library of this name with the symbols that they look for in it is made in the
first folder. What is called in them says that there is no device. Needs readelf and cc.
"""

import collections
import pathlib
import re
import subprocess
import sys
import tempfile

SYSTEM = re.compile(r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|gomp|util|atomic|numa|z)\.so|ld-linux|"
                    r"libgomp")
NO_DEVICE = 100  # cudaErrorNoDevice, and CUDA_ERROR_NO_DEVICE


def readelf(what, file):
    return subprocess.run(["readelf", "-W", what, file], check=True, text=True,
                          stdout=subprocess.PIPE).stdout


def libraries(folders):
    return [f for folder in folders for f in sorted(pathlib.Path(folder).glob("*.so*"))
            if f.is_file() and not f.is_symlink()]


def symbols(file):
    """Of the file: the names that it defines, and (name, version) that it looks for elsewhere."""
    defined, wanted = set(), set()
    for line in readelf("--dyn-syms", file).splitlines():
        field = line.split()
        if len(field) < 8 or not field[0].rstrip(":").isdigit():
            continue
        name, _, version = field[7].partition("@")
        if field[6] != "UND":
            defined.add(name)
        elif field[4] == "GLOBAL":
            wanted.add((name, version.lstrip("@")))
    return defined, wanted


def source(names):
    return "".join(f'const char *{name}(void) {{ return "no device"; }}\n'
                   if name.endswith(("String", "Name")) else
                   f"long {name}(void) {{ return {NO_DEVICE}; }}\n" for name in sorted(names))


def make(library, versions, folder):
    """versions: {version or "": names}"""
    with tempfile.TemporaryDirectory() as scratch:
        code, script = pathlib.Path(scratch, "stub.c"), pathlib.Path(scratch, "stub.map")
        code.write_text(source(set().union(*versions.values(), set())))
        named = {v: names for v, names in versions.items() if v}
        script.write_text("".join(
            f"{v} {{ global: {' '.join(n + ';' for n in sorted(names))} }};\n"
            for v, names in sorted(named.items())))
        subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", folder / library, code,
                        f"-Wl,-soname,{library}"]
                       + ([f"-Wl,--version-script={script}"] if named else []), check=True)


def main(folders):
    files = libraries(folders)
    needed, defined, wanted = set(), set(), set()
    for file in files:
        ours, theirs = symbols(file)
        defined |= ours
        wanted |= theirs
        needed |= set(re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("-d", file)))
    here = {f.name for f in files}
    absent = sorted(n for n in needed - here if not SYSTEM.match(n))
    # Which library a version belongs to, the files say; what has none may be found in any library.
    owner = {}
    for file in files:
        library = ""
        for line in readelf("--version-info", file).splitlines():
            if found := re.search(r"File: (\S+)", line):
                library = found[1]
            elif found := re.search(r"Name: (\S+)\s+Flags", line):
                owner[found[1]] = library
    stubs = {library: collections.defaultdict(set) for library in absent}
    for name, version in wanted:
        if version and owner.get(version) in stubs:
            stubs[owner[version]][version].add(name)
        elif not version and name not in defined and absent:
            stubs[absent[0]][""].add(name)
    for library, versions in stubs.items():
        make(library, versions, pathlib.Path(folders[0]))
    print(f"{len(stubs)} libraries of CUDA are stubs: {', '.join(stubs)}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
