"""The package as pip makes it of the sources, and as a type checker sees it."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

SOURCES = pathlib.Path(__file__).parents[2] / "client" / "python"

needs_sources = pytest.mark.skipif(not (SOURCES / "pyproject.toml").exists(),
                                   reason="the tests of a bundle have no sources beside them")


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != "__pycache__"
                  and p.suffix != ".pyc")


@needs_sources
def test_pip_makes_a_package_of_python_alone_and_writes_nothing_beside_the_sources(tmp_path):
    """TS_TEST_BACKEND: the folder that has scikit-build-core, if Python doesn't find it itself."""
    backend = {**os.environ, "PYTHONPATH": os.environ.get("TS_TEST_BACKEND", "")}
    for needed in "pip", "scikit_build_core":
        if subprocess.run([sys.executable, "-c", f"import {needed}"], check=False, env=backend,
                          stderr=subprocess.DEVNULL).returncode != 0:
            pytest.skip(f"no {needed}")
    before = files(SOURCES)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps",
                    "--no-build-isolation", "--disable-pip-version-check",
                    "--config-settings=wheel.cmake=false", "--wheel-dir", tmp_path, SOURCES],
                   check=True, timeout=120, env={**backend, "CC": "false", "CXX": "false"})
    assert files(SOURCES) == before
    wheel, = tmp_path.glob("tinyserve-*-py3-none-any.whl")
    modules = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("tinyserve/")}
    assert modules == {str(path.relative_to(SOURCES)) for path in
                       (SOURCES / "tinyserve").rglob("*")
                       if path.is_file() and "__pycache__" not in path.parts}


@needs_sources
def test_a_source_build_names_all_that_it_lacks(tmp_path):
    for needed in "cmake", "ninja":
        if shutil.which(needed) is None:
            pytest.skip(f"no {needed}")
    result = subprocess.run(
        ["cmake", "-S", SOURCES.parents[1], "-B", tmp_path, "-G", "Ninja", "-DTS_CUDA=OFF",
         "-DCMAKE_DISABLE_FIND_PACKAGE_nng=ON"], check=False, text=True, timeout=120,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "PKG_CONFIG_LIBDIR": "/nowhere"})
    assert result.returncode == 1
    told = " ".join(result.stderr.split())
    assert ("On Debian and Ubuntu: apt install libprotobuf-c-dev libxxhash-dev libinih-dev "
            "libjansson-dev libncurses-dev libmicrohttpd-dev libnng-dev" in told), told


@needs_sources
def test_a_type_checker_finds_nothing(tmp_path):
    if subprocess.run([sys.executable, "-c", "import mypy"], check=False,
                      stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("no mypy")
    user = tmp_path / "user.py"
    user.write_text("import pathlib\nimport tinyserve\n"
                    "with tinyserve.connect(pathlib.Path('/s'), timeout=3) as client:\n"
                    "    reveal_type(client.pool('p').step([1], [1]).q.float32())\n"
                    "    tinyserve.connect(timout=3)\n")
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", tmp_path / "cache", "--config-file",
         SOURCES / "pyproject.toml", SOURCES / "tinyserve", user], text=True, check=False,
        timeout=280, stdout=subprocess.PIPE, env={**os.environ, "MYPYPATH": str(SOURCES)})
    found = [line for line in result.stdout.splitlines() if "error:" in line]
    assert len(found) == 1 and 'Unexpected keyword argument "timout"' in found[0], result.stdout
    assert "32" in result.stdout and "ndarray" in result.stdout
