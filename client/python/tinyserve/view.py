"""Views of shared memory that NumPy, PyTorch and CuPy take without copying."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    import torch

# dtype: (bytes, DLPack's type code, NumPy's type string; bf16 and fp8 have none of their own)
DTYPES = {"fp32": (4, 2, "<f4"), "fp16": (2, 2, "<f2"), "bf16": (2, 4, "<u2"),
          "fp8_e4m3": (1, 10, "|u1"), "uint8": (1, 1, "|u1")}

_CPU, _CUDA = 1, 2  # DLPack's device types


class _DLDevice(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", _DLDevice), ("ndim", ctypes.c_int32),
                ("dtype", _DLDataType), ("shape", ctypes.POINTER(ctypes.c_int64)),
                ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64)]


class _DLManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = [("dl_tensor", _DLTensor), ("manager_ctx", ctypes.c_void_p),
                             ("deleter", _Deleter)]

_exported: dict[int, Any] = {}  # what tensors made of views hold on to, by address


@_Deleter
def _delete(managed):
    _exported.pop(ctypes.addressof(managed.contents), None)


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.restype = ctypes.c_int
_capsule_is.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
_capsule_get = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_get.restype = ctypes.c_void_p
_capsule_get.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


@_Destructor
def _drop_capsule(capsule):
    """A capsule that nobody took lets go what it holds; one that was taken has another name."""
    if _capsule_is(capsule, b"dltensor"):
        _exported.pop(_capsule_get(capsule, b"dltensor"), None)


class View:
    """An array of shared memory: nothing is copied.

    shape     elements in each dimension
    strides   bytes from one to the next
    dtype     "fp32", "fp16", "bf16" or "fp8_e4m3"
    device    None for host memory, else the CUDA device's ordinal in this process
    ptr       address of the first element

    `numpy()`, `numpy.asarray(view)` and indexing work on host memory (bf16 shows as uint16, fp8 as
    uint8);
    `torch()` and `torch.from_dlpack(view)` on any memory; `cupy.asarray(view)` and
    `torch.as_tensor(view)` on device memory. A view, and what is made of it, is good as long as the
    step or pool that gave it is open; `owner` is kept alive, not kept open.
    """

    __slots__ = ("ptr", "shape", "strides", "dtype", "device", "writable", "owner")

    def __init__(self, ptr: int, shape: tuple[int, ...], dtype: str, device: int | None,
                 owner: object, strides: tuple[int, ...] | None = None,
                 writable: bool = True) -> None:
        if strides is None:
            size = DTYPES[dtype][0]
            strides = tuple(math.prod(shape[i + 1:]) * size for i in range(len(shape)))
        self.ptr, self.shape, self.strides, self.dtype = ptr, shape, strides, dtype
        self.device, self.owner, self.writable = device, owner, writable

    def __repr__(self) -> str:
        where = "host" if self.device is None else f"cuda:{self.device}"
        return f"<tinyserve.View {self.dtype} {list(self.shape)} on {where} at {self.ptr:#x}>"

    def __len__(self) -> int:
        return self.shape[0]

    def _interface(self) -> dict[str, Any]:
        return {"shape": self.shape, "strides": self.strides, "typestr": DTYPES[self.dtype][2],
                "data": (self.ptr, not self.writable), "version": 3}

    @property
    def __array_interface__(self) -> dict[str, Any]:
        if self.device is not None:
            raise AttributeError("device memory has no __array_interface__: use torch() or CuPy")
        return self._interface()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.device is None:
            raise AttributeError("host memory has no __cuda_array_interface__: use numpy()")
        if self.dtype in ("bf16", "fp8_e4m3"):
            raise AttributeError(f"__cuda_array_interface__ has no {self.dtype}: use torch()")
        return self._interface()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CPU, 0) if self.device is None else (_CUDA, self.device)

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        """A DLPack capsule. Nothing is synchronised: order the streams yourself."""
        size, code, _name = DTYPES[self.dtype]
        n = len(self.shape)
        shape = (ctypes.c_int64 * n)(*self.shape)
        strides = (ctypes.c_int64 * n)(*(s // size for s in self.strides))
        managed = _DLManagedTensor()
        managed.dl_tensor = _DLTensor(self.ptr, _DLDevice(*self.__dlpack_device__()), n,
                                      _DLDataType(code, size * 8, 1),
                                      ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)),
                                      ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64)), 0)
        managed.deleter = _delete
        address = ctypes.addressof(managed)
        _exported[address] = (managed, shape, strides, self.owner)
        return _new_capsule(address, b"dltensor", ctypes.cast(_drop_capsule, ctypes.c_void_p))

    def numpy(self) -> "numpy.ndarray":
        """The same memory as a NumPy array (host memory; bf16 as uint16, fp8 as uint8)."""
        import numpy
        return numpy.asarray(self)

    def torch(self) -> "torch.Tensor":
        """The same memory as a torch tensor. Writing to a read-only view through it is a fault."""
        import torch
        if self.dtype == "fp8_e4m3":  # newer than many a DLPack
            bytes_ = View(self.ptr, self.shape, "uint8", self.device, self.owner, self.strides,
                          self.writable)
            return torch.from_dlpack(bytes_).view(torch.float8_e4m3fn)
        return torch.from_dlpack(self)

    def __getitem__(self, index: Any) -> Any:
        return self.numpy()[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        if self.device is not None:
            self.torch()[index] = value
        else:
            self.numpy()[index] = value
