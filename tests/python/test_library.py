"""What the package checks of the library that it loads."""

import ctypes
import inspect
import re
import types
from pathlib import Path

import pytest

import tinyserve
from tinyserve import _lib
from tinyserve.convert import BITS
from tinyserve.records import DTYPE_NAMES
from tinyserve.view import DTYPES


ROOT = Path(__file__).resolve().parents[2]
IS_TREE = (ROOT / "client/include").is_dir()  # else the package is installed, with all of it
HEADERS = [*(ROOT / "client/include").glob("*.h"), ROOT / "kernels/base/tinyserve_types.h"] \
    if IS_TREE else [*(_lib.NATIVE / "include").rglob("*.h")]
PAGES = (ROOT / "client/man" if IS_TREE else _lib.NATIVE / "share/man/man3").glob("*.3")
DECLARATION = re.compile(r"^typedef struct (ts_\w+) \{\n(.*?)^\} \1;", re.M | re.S)


def declared(text):
    """The names of each struct's members, by its name."""
    return {name: re.findall(r"(\w+)(?:\[\w+\])?[,;]", body)
            for name, body in DECLARATION.findall(re.sub(r"/\*.*?\*/", "", text, flags=re.S))}


HEADER = declared("".join(header.read_text() for header in HEADERS))


@pytest.mark.parametrize("struct", _lib._STRUCTS, ids=lambda struct: struct.__doc__)
def test_a_structure_has_the_members_of_the_header(struct):
    assert [name for name, _ in struct._fields_] == HEADER[struct.__doc__]


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda p: p.name)
def test_a_manual_has_the_members_of_the_header(page):
    text = page.read_text()
    told = set(re.findall(r"\w+", " ".join(re.findall(r"^\.(?:It )?Va (.*)", text, re.M))))
    for name, members in declared(text).items():
        assert members == HEADER[name], name
        if name.endswith("_options"):
            assert set(members) - told == {"size"}, name


def test_a_run_takes_all_options_of_the_header():
    named = set(inspect.signature(tinyserve.Step.run).parameters) - {"self", "layer"}
    assert named == set(HEADER["ts_run_options"]) - {"size", "on_stream"}


def test_python_has_the_types_of_the_library():
    _lib.lib.ts_dtype_name.restype = ctypes.c_char_p
    names = [_lib.lib.ts_dtype_name(i).decode() for i in range(len(DTYPE_NAMES))]
    assert list(DTYPE_NAMES) == names == list(BITS)
    assert _lib.lib.ts_dtype_name(len(names)) is None
    assert set(names) < set(DTYPES)


def library(version=tinyserve.__version__, **sizes):
    """A library that says so of itself."""
    functions = {name: None for name in _lib._FUNCTIONS}
    functions["ts_version"] = lambda: version.encode()
    functions["ts_struct_bytes"] = lambda name: sizes.get(name.decode(), real_bytes(name))
    return types.SimpleNamespace(**functions)


def real_bytes(name):
    return _lib.lib.ts_struct_bytes(name)


def test_the_library_has_the_packages_version():
    assert _lib.lib.ts_version().decode() == tinyserve.__version__


def test_a_library_of_another_patch_fits():
    major, minor, _ = tinyserve.__version__.split(".")
    _lib.check(library(version=f"{major}.{minor}.99"), "libother.so")


def test_a_library_of_another_version_is_refused():
    with pytest.raises(ImportError, match=r"libother.so is libtinyserve 7.8.9, and the package is "
                                          rf"tinyserve {tinyserve.__version__}"):
        _lib.check(library(version="7.8.9"), "libother.so")


def test_a_structure_of_another_size_is_refused():
    size = ctypes.sizeof(_lib.CRunOptions)
    with pytest.raises(ImportError, match=f"ts_run_options has {size + 8} bytes in libother.so .*"
                                          f", and {size} in tinyserve"):
        _lib.check(library(ts_run_options=size + 8), "libother.so")


def test_a_library_without_a_function_is_refused():
    other = library()
    del other.ts_frame_new
    with pytest.raises(ImportError, match="libother.so has no ts_frame_new"):
        _lib.check(other, "libother.so")
