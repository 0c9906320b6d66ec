"""Views of shared memory that NumPy, PyTorch and CuPy take without copying."""

from __future__ import annotations

import ctypes
import math
import sys
from typing import TYPE_CHECKING, Any

from .opened import Memory, OfOneProcess, Opened

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

# dtype: (bytes, DLPack's type code, NumPy's type string: bf16 and fp8 have none of their own)
DTYPES = {"fp32": (4, 2, "<f4"), "fp16": (2, 2, "<f2"), "bf16": (2, 4, None),
          "fp8_e4m3": (1, 10, None), "uint8": (1, 1, "|u1")}

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

# What tensors made of views hold on to, by address, and the capsules that may yet be taken.
_exported: dict[int, Any] = {}
_capsules: dict[int, Any] = {}


def _forget(managed: Any, exported: dict[int, Any] = _exported,
            address: Any = ctypes.addressof) -> None:
    exported.pop(address(managed.contents), None)


_delete = _Deleter(_forget)


# A tensor may be freed after this module is, as the interpreter ends: its function has all that it
# needs as defaults, and is never freed.
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_delete))

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.restype = ctypes.c_int
_capsule_is.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _references(capsules: dict[int, Any], address: int) -> int:
    return sys.getrefcount(capsules[address])


_UNREFERENCED = _references({0: object()}, 0)  # beside that dictionary, which differs by version


def forget_untaken() -> None:
    """Lets go what capsules hold that nobody took and nobody has any more; one that was taken has
    another name. They have no destructor, which would run Python while the exception is set for
    which a consumer gave its capsule up, and lose it."""
    for address in list(_capsules):
        try:
            taken = not _capsule_is(_capsules[address], b"dltensor")
            if taken or _references(_capsules, address) <= _UNREFERENCED:
                del _capsules[address]
                if not taken:
                    _exported.pop(address, None)
        except KeyError:
            pass  # another thread has let it go


_converter: Any = None  # convert.py, which needs NumPy: loaded when an array is first needed


def _convert() -> Any:
    global _converter
    if _converter is None:
        try:
            from . import convert
        except ModuleNotFoundError as error:
            if error.name != "numpy":
                raise
            raise ImportError("a view's numbers need NumPy: pip install 'tinyserve[numpy]', or "
                              "numpy; .torch() goes without") from error
        _converter = convert
    return _converter


class _Interface(OfOneProcess):
    """What NumPy makes an array of, and keeps as the array's base: it holds the memory."""

    __slots__ = ("__array_interface__", "memory")

    def __init__(self, interface: dict[str, Any], memory: Memory) -> None:
        self.__array_interface__ = interface
        self.memory = memory


class View(OfOneProcess):
    """An array of shared memory: nothing is copied.

    shape     elements in each dimension
    strides   bytes from one to the next
    dtype     "fp32", "fp16", "bf16" or "fp8_e4m3"
    device    None for host memory, else the CUDA device's ordinal in this process
    ptr       address of the first element
    writable  whether it may be written

    `view[...] = numbers` rounds floats to the view's type, whatever their own; integers are
    refused, other than a plain number or in fp32. `numpy()`, `numpy.asarray(view)` and reading by
    an index work on host memory; for bf16 and fp8 they need ml_dtypes. `bits()` has the bits of any
    type and `float32()` a copy of its numbers. `torch()` and `torch.from_dlpack(view)` work on any
    memory; `cupy.asarray(view)` and `torch.as_tensor(view)` on device memory.

    A view is good as long as the step or pool that gave it is open, and raises DisconnectedError
    after that. An array or tensor made of it can't: after its step it shows what later steps put
    there, and after its session numbers of no meaning. In host memory it can still be touched: the
    memory stays mapped as long as the array lives. A GPU's memory doesn't: copy before you close.
    """

    __slots__ = ("ptr", "shape", "dtype", "device", "writable", "_strides", "_opened", "_memory",
                 "_bits", "_numpy", "_torch")

    _instead = "copy its numbers, by float32() or numpy().copy() or torch().clone()"

    def __init__(self, ptr: int, shape: tuple[int, ...], dtype: str, device: int | None,
                 opened: Opened, memory: Memory, strides: tuple[int, ...] | None = None,
                 writable: bool = True) -> None:
        self.ptr, self.shape, self.dtype = ptr, shape, dtype
        self.device, self.writable = device, writable
        self._opened, self._memory = opened, memory
        self._strides = strides  # None: there are no gaps
        self._bits: NDArray[Any] | None = None
        self._numpy: NDArray[Any] | None = None
        self._torch: torch.Tensor | None = None

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one element to the next in each dimension."""
        if self._strides is None:
            size, n = DTYPES[self.dtype][0], len(self.shape)
            self._strides = tuple(math.prod(self.shape[i + 1:]) * size for i in range(n))
        return self._strides

    def __repr__(self) -> str:
        where = "host" if self.device is None else f"cuda:{self.device}"
        ended = ", ended" if self._opened.closed else ""
        return (f"<tinyserve.View {self.dtype} {list(self.shape)} on {where} at {self.ptr:#x}"
                f"{ended}>")

    def __len__(self) -> int:
        return self.shape[0]

    def _interface(self, typestr: str) -> dict[str, Any]:
        return {"shape": self.shape, "strides": self._strides, "typestr": typestr,
                "data": (self.ptr, not self.writable), "version": 3}

    def _array(self, typestr: str) -> NDArray[Any]:
        if self.device is not None:
            raise TypeError(f"the view is on cuda:{self.device}: use torch() or CuPy")
        interface = _Interface(self._interface(typestr), self._memory)
        array: NDArray[Any] = _convert().as_array(interface)
        return array

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        typestr = DTYPES[self.dtype][2]
        if self.device is None:
            raise AttributeError("host memory has no __cuda_array_interface__: use numpy()")
        if typestr is None:
            raise AttributeError(f"__cuda_array_interface__ has no {self.dtype}: use torch()")
        self._opened.check()
        return self._interface(typestr)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CPU, 0) if self.device is None else (_CUDA, self.device)

    def __dlpack__(self, *, stream: Any = None, copy: bool | None = None, **_: Any) -> Any:
        """A DLPack capsule. Nothing is synchronised: order the streams yourself. BufferError: a
        copy is asked for."""
        self._opened.check()
        if copy:
            raise BufferError("a view is shared memory: copy what it gives")
        forget_untaken()
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
        _exported[address] = (managed, shape, strides, self._memory)
        capsule = _capsules[address] = _new_capsule(address, b"dltensor", None)
        return capsule

    def bits(self) -> NDArray[Any]:
        """The same memory as a NumPy array of unsigned integers of the elements' size (host)."""
        self._opened.check()
        if self._bits is None:
            self._bits = self._array(f"<u{DTYPES[self.dtype][0]}")
        return self._bits[...]  # a new array object each time: its shape may be set

    def numpy(self) -> NDArray[Any]:
        """The same memory as a NumPy array (host): of float32, float16, or for bf16 and fp8 of
        ml_dtypes' types. TypeError: that isn't installed."""
        self._opened.check()
        if self._numpy is None:
            typestr = DTYPES[self.dtype][2]
            self._numpy = self._array(typestr) if typestr is not None else \
                self.bits().view(_convert().array_type(self.dtype))
        return self._numpy[...]

    def float32(self) -> NDArray[np.float32]:
        """A copy of the numbers (host)."""
        numbers: NDArray[np.float32] = _convert().to_float32(self.bits(), self.dtype)
        return numbers

    def torch(self) -> torch.Tensor:
        """The same memory as a torch tensor. Writing to a read-only view through it is a fault."""
        self._opened.check()
        if self._torch is None:
            import torch
            if self.dtype == "fp8_e4m3":  # newer than many a DLPack
                bytes_ = View(self.ptr, self.shape, "uint8", self.device, self._opened,
                              self._memory, self.strides, self.writable)
                self._torch = torch.from_dlpack(bytes_).view(torch.float8_e4m3fn)
            else:
                self._torch = torch.from_dlpack(self)
        return self._torch.detach()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if dtype is None:
            return self.numpy().copy() if copy else self.numpy()
        import numpy
        if DTYPES[self.dtype][2] == numpy.dtype(dtype).str:
            return self.numpy().copy() if copy else self.numpy()
        if copy is False:
            raise ValueError(f"an array of {dtype} is a copy of a view of {self.dtype}")
        return self.float32().astype(dtype, copy=False)

    def __getitem__(self, index: Any) -> Any:
        return self.numpy()[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._opened.check()
        if not self.writable:
            raise ValueError("the view is read-only")
        if isinstance(value, View):
            if self.device is None and value.device is None and self.dtype == value.dtype:
                self.bits()[index] = value.bits()
                return
            value = value.float32() if value.device is None else value.torch()
        torch = sys.modules.get("torch")
        if self.device is not None or (torch is not None and isinstance(value, torch.Tensor)):
            self._set_tensor(index, value)
        else:
            self.bits()[index] = _convert().to_bits(value, self.dtype)

    def _set_tensor(self, index: Any, value: Any) -> None:
        import torch
        if not isinstance(value, (torch.Tensor, int, float)):
            value = torch.as_tensor(_convert().floats(value, self.dtype))
        if self.dtype != "fp32" and isinstance(value, torch.Tensor) and \
                not value.is_floating_point():
            raise TypeError(f"{value.dtype} assigned to a view of {self.dtype}: numbers must be "
                            "floats; what is bits already goes to torch()")
        self.torch()[index] = value
