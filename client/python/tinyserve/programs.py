"""The programs that are part of the package: `tinyserved`, `tsctl`, `tsbench`, `ts-generate`.

pip makes a command of each. For one's own use of them, `find("tinyserved")` is the path of the
program itself, and `python -m tinyserve.programs` lists them all. A package that was installed
without programs (`--config-settings=wheel.cmake=false`) finds those of the system.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import sys

from . import _lib

PROGRAMS = ("tinyserved", "tsctl", "tsbench", "ts-generate")


def find(name: str) -> str:
    """The path of a program: of tinyserve-cuda if that is installed and has it, of this package,
    or else the system's. ValueError: it isn't one of PROGRAMS; FileNotFoundError: it is nowhere."""
    if name not in PROGRAMS:
        raise ValueError(f"{name!r} isn't a program of TinyServe; there are {', '.join(PROGRAMS)}")
    for folder in _lib.CUDA, _lib.NATIVE:
        program = folder / "bin" / name
        if program.is_file():
            return str(program)
    # Not by PATH alone: there, pip's command of this name comes first.
    own = pathlib.Path(sys.argv[0]).absolute().parent
    folders = [f for f in os.get_exec_path() if pathlib.Path(f).absolute() != own]
    found = shutil.which(name, path=os.pathsep.join([*folders, "/usr/sbin", "/sbin"]))
    if found is None:
        raise FileNotFoundError(
            f"there is no {name}: this tinyserve was installed without programs, and PATH has none "
            "(a wheel has them; on Debian, the packages tinyserved and tinyserve-tools)")
    return found


def run() -> None:
    """What pip's commands call: becomes the program of the command's name."""
    try:
        program = find(pathlib.Path(sys.argv[0]).name)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"tinyserve: {error}")
    os.execv(program, [sys.argv[0], *sys.argv[1:]])


def main() -> None:
    """Says where things are."""
    print(f"libtinyserve  {_lib.found()}")
    if _lib.NATIVE.is_dir():
        print(f"headers       {_lib.NATIVE / 'include'}")
        print(f"manual pages  {_lib.NATIVE / 'share' / 'man'}")
        print(f"monitoring    {_lib.NATIVE / 'share' / 'tinyserve' / 'monitoring'}")
    for name in PROGRAMS:
        try:
            print(f"{name:13} {find(name)}")
        except FileNotFoundError as error:
            print(f"{name:13} {error}")


if __name__ == "__main__":
    main()
