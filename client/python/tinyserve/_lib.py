"""The C library: where it is found, its structures and its functions' types."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import pathlib
from ctypes import (POINTER, Structure, c_bool, c_char, c_char_p, c_float, c_int, c_int32,
                    c_size_t, c_uint, c_uint32, c_uint64, c_void_p)
from typing import Any

from ._version import __version__

# What a wheel has beside the package: bin/, lib/, include/; and that of tinyserve-cuda: bin/, lib/.
NATIVE = pathlib.Path(__file__).parent / "_native"
CUDA = NATIVE.parent / "_cuda"


class _Sized(Structure):
    """Options whose first member is their size, which is set here."""

    def __init__(self, *values: Any, **named: Any) -> None:
        super().__init__(ctypes.sizeof(self), *values, **named)


class Options(_Sized):
    """ts_options"""
    _fields_ = [("size", c_size_t), ("url", c_char_p), ("program", c_char_p),
                ("timeout_ms", c_uint32), ("retries", c_uint32), ("wait_ms", c_uint32),
                ("exchange_bytes", c_size_t), ("transport", c_int), ("spin_us", c_uint32),
                ("exec", c_int), ("threads", c_uint32), ("reconnect", c_int)]


class CGeometry(Structure):
    """ts_geometry"""
    _fields_ = [("layers", c_uint32), ("kv_heads", c_uint32), ("head_dim", c_uint32),
                ("block_tokens", c_uint32), ("dtype", c_int), ("layout", c_int)]


class CStepOptions(_Sized):
    """ts_step_options"""
    _fields_ = [("size", c_size_t), ("heads", c_uint32), ("io_dtype", c_int), ("scale", c_float),
                ("no_run", c_bool), ("kernel", c_char_p), ("tokens", POINTER(c_uint32)),
                ("wait_ms", c_uint32), ("priority", c_int32)]


class CSeqOptions(_Sized):
    """ts_seq_options"""
    _fields_ = [("size", c_size_t), ("space", c_char_p), ("space_bytes", c_size_t),
                ("wait_ms", c_uint32), ("twins", POINTER(c_uint32))]


class CKeepOptions(_Sized):
    """ts_keep_options"""
    _fields_ = [("size", c_size_t), ("ttl_ms", c_uint64), ("replace", c_bool)]


class CFrameOptions(_Sized):
    """ts_frame_options"""
    _fields_ = [("size", c_size_t), ("seqs", c_uint32), ("new_tokens", c_uint32),
                ("tokens", c_uint64), ("step", POINTER(CStepOptions))]

    def __init__(self, seqs: int, new_tokens: int, tokens: int, step: CStepOptions) -> None:
        super().__init__(seqs, new_tokens, tokens, ctypes.pointer(step))


class CRunOptions(_Sized):
    """ts_run_options"""
    _fields_ = [("size", c_size_t), ("scale", c_float), ("soft_cap", c_float),
                ("alibi", c_bool), ("window", c_uint32), ("sinks", c_bool), ("lse", c_bool),
                ("scales", c_bool), ("rope_theta", c_float),
                ("rope_dims", c_uint32), ("rope_interleaved", c_bool), ("on_stream", c_bool),
                ("stream", c_void_p)]


class CErrorInfo(_Sized):
    """ts_error_info"""
    _fields_ = [("size", c_size_t), ("status", c_int), ("needed", c_uint64), ("free", c_uint64),
                ("limit", c_uint64), ("cached", c_uint64), ("pinned", c_uint64),
                ("others", c_uint64)]


class CPoolRoom(_Sized):
    """ts_pool_room"""
    _fields_ = [("size", c_size_t)] + [(name, c_uint64) for name in (
        "blocks", "available", "used", "cached", "pinned", "limit", "others", "sequences",
        "waiting", "asked_tokens", "found_tokens")]


class CPoolInfo(Structure):
    """ts_pool_info"""
    _fields_ = [("name", c_char * 64), ("device", c_char * 32), ("geometry", CGeometry),
                ("blocks", c_uint32)]


class CKv(Structure):
    """ts_kv"""
    _fields_ = [("k", c_void_p), ("v", c_void_p), ("head_stride", c_size_t)]


class CKept(Structure):
    """ts_kept"""
    _fields_ = [("name", c_char * 128), ("seq", c_uint64), ("left_ms", c_uint64),
                ("length", c_uint32), ("blocks", c_uint32)]


_STRUCTS: tuple[type[Structure], ...] = (Options, CGeometry, CStepOptions, CFrameOptions,
                                         CRunOptions, CErrorInfo, CPoolRoom, CPoolInfo, CKv,
                                         CSeqOptions, CKeepOptions, CKept)


_u32p, _u64p = POINTER(c_uint32), POINTER(c_uint64)

# name: (result, arguments); a result of None is a ts_status that is checked by the caller
_FUNCTIONS = {
    "ts_version": (c_char_p, []),
    "ts_struct_bytes": (c_size_t, [c_char_p]),
    "ts_connect": (c_int, [POINTER(Options), POINTER(c_void_p)]),
    "ts_disconnect": (None, [c_void_p]),
    "ts_error": (c_char_p, [c_void_p]),
    "ts_error_read": (c_int, [c_void_p, POINTER(CErrorInfo)]),
    "ts_session_id": (c_uint64, [c_void_p]),
    "ts_wait_end": (c_int, [c_void_p]),
    "ts_client_transport": (c_int, [c_void_p]),
    "ts_client_exec": (c_int, [c_void_p]),
    "ts_client_restarts": (c_uint32, [c_void_p]),
    "ts_daemon_version": (c_char_p, [c_void_p]),
    "ts_status_name": (c_char_p, [c_int]),
    "ts_pool_open": (c_int, [c_void_p, c_char_p, c_uint, POINTER(c_void_p)]),
    "ts_pool_close": (None, [c_void_p]),
    "ts_pool_geometry": (POINTER(CGeometry), [c_void_p, c_uint32]),
    "ts_pool_blocks": (c_uint32, [c_void_p]),
    "ts_pool_sequence_max": (c_uint32, [c_void_p]),
    "ts_pool_device": (c_char_p, [c_void_p]),
    "ts_pool_memory": (c_char_p, [c_void_p]),
    "ts_pool_cuda_device": (c_int, [c_void_p, POINTER(c_int)]),
    "ts_pool_list": (c_int, [c_void_p, POINTER(CPoolInfo), c_size_t, c_uint32, _u32p]),
    "ts_pool_create": (c_int, [c_void_p, c_char_p]),
    "ts_pool_map": (c_int, [c_void_p, _u64p, c_size_t, c_uint32, POINTER(c_void_p)]),
    "ts_pool_hold": (c_void_p, [c_void_p]),
    "ts_exchange_hold": (c_void_p, [c_void_p]),
    "ts_memory_release": (None, [c_void_p]),
    "ts_exchange_device": (c_int, [c_void_p, c_size_t]),
    "ts_exchange_register": (c_int, [c_void_p, c_void_p, c_size_t]),
    "ts_seq_create_with": (c_int, [c_void_p, c_uint32, POINTER(CSeqOptions), _u64p]),
    "ts_seq_match": (c_int, [c_void_p, _u32p, _u32p, c_uint32, POINTER(CSeqOptions), _u64p,
                             _u32p]),
    "ts_seq_fork": (c_int, [c_void_p, c_uint64, c_uint32, _u64p]),
    "ts_seq_fork_at": (c_int, [c_void_p, c_uint64, c_uint32, c_uint32, _u64p]),
    "ts_seq_truncate": (c_int, [c_void_p, _u64p, _u32p, c_uint32]),
    "ts_seq_shorten": (c_int, [c_void_p, _u64p, _u32p, c_uint32]),
    "ts_seq_free": (c_int, [c_void_p, _u64p, c_uint32]),
    "ts_seq_forget": (c_int, [c_void_p, _u64p, c_uint32]),
    "ts_seq_select": (c_int, [c_void_p, _u64p, c_uint32, _u32p, c_uint32, _u64p]),
    "ts_pool_stats": (c_int, [c_void_p, POINTER(CPoolRoom)]),
    "ts_seq_keep_with": (c_int, [c_void_p, c_uint64, c_char_p, POINTER(CKeepOptions)]),
    "ts_seq_attach": (c_int, [c_void_p, c_char_p, _u64p, _u32p]),
    "ts_seq_list": (c_int, [c_void_p, c_char_p, c_char_p, POINTER(CKept), c_size_t, c_uint32,
                            _u32p]),
    "ts_seq_ticket": (c_int, [c_void_p, c_uint64, c_uint32, c_char_p]),
    "ts_seq_redeem": (c_int, [c_void_p, c_char_p, _u64p, _u32p]),
    "ts_seq_lengths": (c_int, [c_void_p, _u64p, c_uint32, _u32p]),
    "ts_seq_slots": (c_int, [c_void_p, c_uint64, c_uint32, c_uint32, c_uint32, _u64p]),
    "ts_slot_kv": (c_int, [c_void_p, c_uint64, c_uint32, POINTER(CKv)]),
    "ts_seq_append": (c_int, [c_void_p, _u64p, _u32p, c_uint32, _u64p]),
    "ts_step_begin": (c_int, [c_void_p, _u64p, _u32p, c_uint32, POINTER(CStepOptions),
                              POINTER(c_void_p)]),
    "ts_step_tokens": (c_uint32, [c_void_p]),
    "ts_step_start": (c_uint32, [c_void_p, c_uint32]),
    "ts_step_q": (c_void_p, [c_void_p]),
    "ts_step_k": (c_void_p, [c_void_p]),
    "ts_step_v": (c_void_p, [c_void_p]),
    "ts_step_out": (c_void_p, [c_void_p]),
    "ts_step_slots": (None, [c_void_p, c_uint32, _u64p]),
    "ts_step_sinks": (c_void_p, [c_void_p]),
    "ts_step_scales": (c_void_p, [c_void_p]),
    "ts_step_alibi": (c_void_p, [c_void_p]),
    "ts_step_lse": (c_void_p, [c_void_p]),
    "ts_step_run_with": (c_int, [c_void_p, c_uint32, POINTER(CRunOptions)]),
    "ts_step_commit": (c_int, [c_void_p, _u32p]),
    "ts_step_abort": (c_int, [c_void_p]),
    "ts_frame_new": (c_int, [c_void_p, POINTER(CFrameOptions), POINTER(c_void_p)]),
    "ts_frame_begin": (c_int, [c_void_p, _u64p, c_uint32, POINTER(CStepOptions),
                               POINTER(c_void_p)]),
    "ts_frame_free": (None, [c_void_p]),
}


def check(lib: Any, name: str) -> None:
    """Raises ImportError unless the library fits this package: its version, its functions, and the
    sizes of its structures."""
    missing = [function for function in _FUNCTIONS if not hasattr(lib, function)]
    if missing:
        raise ImportError(f"{name} has no {missing[0]}: it is not the libtinyserve of tinyserve "
                          f"{__version__}")
    lib.ts_version.restype, lib.ts_version.argtypes = _FUNCTIONS["ts_version"]
    version = lib.ts_version().decode()
    if version.split(".")[:2] != __version__.split(".")[:2]:
        raise ImportError(f"{name} is libtinyserve {version}, and the package is tinyserve "
                          f"{__version__}: install those of one version")
    lib.ts_struct_bytes.restype, lib.ts_struct_bytes.argtypes = _FUNCTIONS["ts_struct_bytes"]
    for struct in _STRUCTS:
        name_in_c = str(struct.__doc__)
        ours, theirs = ctypes.sizeof(struct), lib.ts_struct_bytes(name_in_c.encode())
        if ours != theirs:
            raise ImportError(f"{name_in_c} has {theirs} bytes in {name} (libtinyserve "
                              f"{version}), and {ours} in tinyserve {__version__}")


def found() -> str:
    """Which libtinyserve is loaded: TINYSERVE_LIBRARY, the package's own, or the one that the
    system finds."""
    own = NATIVE / "lib" / "libtinyserve.so.0"
    return os.environ.get("TINYSERVE_LIBRARY") or (str(own) if own.exists() else own.name)


def load() -> ctypes.CDLL:
    """Loads libtinyserve, and raises ImportError if it doesn't fit."""
    name = found()
    try:
        lib = ctypes.CDLL(name)
    except OSError as error:
        raise ImportError(f"libtinyserve can't be loaded ({error}); "
                          "TINYSERVE_LIBRARY can name its path") from error
    check(lib, name)
    for function, (result, arguments) in _FUNCTIONS.items():
        f = getattr(lib, function)
        f.restype = result
        f.argtypes = arguments
    return lib


lib = load()
