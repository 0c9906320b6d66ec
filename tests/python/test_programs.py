"""Where the package finds its programs and its library: its own, a GPU's, the system's."""

import os
import subprocess
import sys

import pytest

import tinyserve
from tinyserve import _lib, programs


def program(folder, name, text="exit 0"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that may have programs in native/bin and cuda/bin, in a system with system/."""
    monkeypatch.setattr(_lib, "NATIVE", tmp_path / "native")
    monkeypatch.setattr(_lib, "CUDA", tmp_path / "cuda")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "venv" / "tinyserved")])
    program(tmp_path / "venv", "tinyserved")
    monkeypatch.setenv("PATH", f"{tmp_path / 'venv'}:{tmp_path / 'system'}")
    return tmp_path


def test_a_gpus_daemon_comes_before_the_packages_own_and_that_before_the_systems(package):
    system = program(package / "system", "tinyserved")
    assert programs.find("tinyserved") == system  # not the command of pip, which would call itself
    own = program(package / "native" / "bin", "tinyserved")
    assert programs.find("tinyserved") == own
    gpu = program(package / "cuda" / "bin", "tinyserved")
    assert programs.find("tinyserved") == gpu
    tsctl = program(package / "native" / "bin", "tsctl")
    assert programs.find("tsctl") == tsctl


def test_what_is_no_program_and_what_is_nowhere_are_told_apart(package):
    with pytest.raises(ValueError, match="'bash' isn't a program of TinyServe; there are "
                                         "tinyserved, tsctl, tsbench, ts-generate"):
        programs.find("bash")
    if not any(os.path.exists(f"{folder}/tsbench") for folder in ("/usr/sbin", "/sbin")):
        with pytest.raises(FileNotFoundError, match="there is no tsbench: this tinyserve was "
                                                    "installed without programs"):
            programs.find("tsbench")


def test_the_library_is_the_named_one_else_the_packages_own_else_the_systems(package, monkeypatch):
    monkeypatch.setenv("TINYSERVE_LIBRARY", "/somewhere/libtinyserve.so.0")
    assert _lib.found() == "/somewhere/libtinyserve.so.0"
    monkeypatch.delenv("TINYSERVE_LIBRARY")
    assert _lib.found() == "libtinyserve.so.0"
    (package / "native" / "lib").mkdir(parents=True)
    (package / "native" / "lib" / "libtinyserve.so.0").touch()
    assert _lib.found() == str(package / "native" / "lib" / "libtinyserve.so.0")


def test_a_command_becomes_the_program_with_its_arguments(tmp_path):
    told = program(tmp_path / "system", "tsctl", 'echo "$$ $*"')
    command = tmp_path / "venv" / "tsctl"
    command.parent.mkdir()
    command.write_text("import pathlib\nfrom tinyserve import _lib, programs\n"
                       "_lib.NATIVE = _lib.CUDA = pathlib.Path('/nowhere')\nprograms.run()\n")
    process = subprocess.Popen(
        [sys.executable, command, "--watch", "a b"], text=True, stdout=subprocess.PIPE,
        env={**os.environ, "PATH": os.path.dirname(told),
             "PYTHONPATH": os.path.dirname(os.path.dirname(tinyserve.__file__))})
    assert process.communicate(timeout=60)[0] == f"{process.pid} --watch a b\n"
