"""What the package checks of the library that it loads."""

import ctypes
import types

import pytest

import tinyserve
from tinyserve import _lib


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
