"""Numbers as the elements of a view, and back: fp32, fp16, bf16 and fp8 (e4m3).

NumPy has no bf16 and no fp8. Where ml_dtypes is installed, arrays have its types; where not, what
is assigned is converted here. Rounding is to the nearest, ties to even, as everywhere in TinyServe:
beyond the largest number lies infinity, in fp8, which has none, the largest number (448).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

as_array = np.asarray

#: how the elements lie in memory
BITS: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype("<u4"), "fp16": np.dtype("<u2"), "bf16": np.dtype("<u2"),
    "fp8_e4m3": np.dtype("u1")}
_NUMPY: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2")}
_ML_DTYPES = {"bf16": "bfloat16", "fp8_e4m3": "float8_e4m3fn"}
#: what _round() needs to know of the types that NumPy doesn't have
_ROUNDING = {"bf16": (8, -126, 0x7f80, 0x7fc0, 15), "fp8_e4m3": (4, -6, 0x7e, 0x7f, 7)}


def array_type(dtype: str) -> np.dtype[Any]:
    """NumPy's type for elements of the view. TypeError: there is none."""
    if dtype in _NUMPY:
        return _NUMPY[dtype]
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(f"NumPy has no {dtype}: install ml_dtypes, or take float32() (a copy), "
                        "bits() or torch(); numbers can be assigned as they are") from None
    return np.dtype(getattr(ml_dtypes, _ML_DTYPES[dtype]))


def floats(value: Any, dtype: str) -> NDArray[Any]:
    """The value's numbers as floats. TypeError: they are no numbers, or may be bits."""
    array: NDArray[Any] = np.asarray(value)
    name = array.dtype.name
    if name.startswith(("bfloat16", "float8")):
        return array.astype(np.float32)
    if array.dtype.kind in "iu" and (dtype == "fp32" or isinstance(value, int)):
        return array.astype(np.float64)
    if array.dtype.kind != "f":
        raise TypeError(f"{name} assigned to a view of {dtype}: numbers must be floats, as from "
                        ".astype(numpy.float32); what is bits already goes to bits()")
    return array


def to_bits(value: Any, dtype: str) -> NDArray[Any]:
    """The value's numbers as elements of a view. TypeError: as floats()."""
    array: NDArray[Any] = np.asarray(value)
    if array.dtype.name == _ML_DTYPES.get(dtype):
        return array.view(BITS[dtype])
    array = floats(array if not isinstance(value, int) else value, dtype)
    flat = array.reshape(-1)  # what has no dimensions has other rules for its types
    if dtype in _NUMPY:
        with np.errstate(over="ignore"):
            bits: NDArray[Any] = flat.astype(_NUMPY[dtype]).view(BITS[dtype])
    elif dtype == "bf16" and array.dtype.itemsize <= 4:
        bits = _fp32_to_bf16(flat.astype(np.float32))
    else:
        bits = _round(flat, *_ROUNDING[dtype]).astype(BITS[dtype])
    return bits.reshape(array.shape)


def to_float32(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """A copy of the elements as float32, which has all their numbers."""
    numbers: NDArray[Any]
    if dtype == "bf16":
        numbers = (bits.astype(np.uint32) << 16).view(np.float32)
    elif dtype == "fp8_e4m3":
        numbers = _FP8[bits]
    else:
        numbers = bits.view(_NUMPY[dtype])
    return numbers.astype(np.float32, copy=dtype == "fp32")


def _fp32_to_bf16(array: NDArray[np.float32]) -> NDArray[Any]:
    bits = array.view(np.uint32)
    rounded = (bits + (0x7fff + (bits >> 16 & 1))) >> 16  # wraps for NaNs alone
    return np.where(np.isnan(array), bits >> 16 | 0x40, rounded).astype(np.uint16)


def _round(array: NDArray[Any], digits: int, least: int, most: int, nan: int,
           sign: int) -> NDArray[Any]:
    """Codes of numbers with `digits` binary digits and exponents from `least` on, sign bit `sign`;
    `most`: of the largest magnitude. From the full number at once: rounding twice can differ."""
    size = np.abs(array)
    finite = np.where(np.isfinite(size), size, 0)
    exponent = np.where(finite == 0, least, np.maximum(np.frexp(finite)[1] - 1, least))
    steps = np.rint(np.ldexp(finite, digits - 1 - exponent))
    code = ((exponent - least).astype(np.int64) << (digits - 1)) + steps.astype(np.int64)
    code = np.where(np.isinf(size), most, np.minimum(code, most))
    code = np.where(np.isnan(size), nan, code)
    signed: NDArray[Any] = (code | np.signbit(array).astype(np.int64) << sign).astype(np.uint16)
    return signed


def _fp8_numbers() -> NDArray[np.float32]:
    code = np.arange(256)
    exponent, steps = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, np.ldexp(steps, -9), np.ldexp(8 + steps, exponent - 10))
    size[code & 127 == 127] = np.nan
    return np.where(code & 128, -size, size).astype(np.float32)


_FP8 = _fp8_numbers()
