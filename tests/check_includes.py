#!/usr/bin/env python3
"""Finds circles of includes: modules of which each includes, by others or itself, the next one.

A module is a source with the header of its name, and with what PARTS says. CMake sees to circles
between folders; this to those inside one. Ends with 1 if there is any."""

import collections
import pathlib
import re
import sys

FOLDERS = ("proto", "daemon", "client", "kernels", "tools")
SUFFIXES = (".c", ".cu", ".h", ".cuh")


#: internal headers, and the modules that they are a part of
PARTS = {
    "daemon/core/block_pool_internal": "daemon/core/block_pool",
    "daemon/core/engine_internal": "daemon/core/engine",
    "daemon/exec/gpu_executor_internal": "daemon/exec/gpu_executor",
    "daemon/exec/step_work_internal": "daemon/exec/step_work",
    "daemon/ipc/nng_server_internal": "daemon/ipc/nng_server",
    "daemon/config/config_keys": "daemon/config/config",
    "kernels/gpu/plan/batch": "kernels/gpu/plan/plan",
    "kernels/gpu/plan/work_split": "kernels/gpu/plan/plan",
    "kernels/cpu/isa/attention_amx_units": "kernels/cpu/isa/attention_amx",
}


def module_of(path, root):
    name = str(path.relative_to(root).parent / path.name.split(".")[0])
    return PARTS.get(name, name)


def read_includes(root):
    """{module: {module that it includes: the file that does}}"""
    files = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*"))
             if path.suffix in SUFFIXES]
    by_name = collections.defaultdict(list)
    for path in files:
        by_name[path.name].append(path)
    includes = collections.defaultdict(dict)
    for path in files:
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.M):
            found = by_name[pathlib.Path(name).name]
            near = [f for f in found if f.parts[:-2] == path.parts[:-2]] or found
            for other in near[:1]:
                one, two = module_of(path, root), module_of(other, root)
                if one != two:
                    includes[one][two] = path
    return includes


def find_circle(includes):
    """One circle as a list of modules, or None."""
    done, way = set(), []

    def visit(module):
        if module in way:
            return way[way.index(module):] + [module]
        if module in done:
            return None
        way.append(module)
        for other in includes.get(module, ()):
            circle = visit(other)
            if circle:
                return circle
        done.add(way.pop())
        return None

    for module in sorted(includes):
        circle = visit(module)
        if circle:
            return circle
    return None


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    includes = read_includes(root)
    circle = find_circle(includes)
    if circle is None:
        print(f"{len(includes)} modules, no circle of includes")
        return 0
    for module, other in zip(circle, circle[1:]):
        print(f"{includes[module][other]} includes one of {other}")
    print("is a circle of includes")
    return 1


if __name__ == "__main__":
    sys.exit(main())
