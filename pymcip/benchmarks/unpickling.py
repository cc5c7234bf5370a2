"""Pickles from the internet, read without running anything that they name.

A pickle is a program: it may import and call whatever it likes. Here it finds only what plain data
need, and in place of NumPy's own functions, which trust their input, others that check it.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pymcip.errors import DataError

MOST_BYTES = 64 << 20  # ground truth of 11,000 images takes half a megabyte
_DTYPE = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248]|c(?:8|16)|[SU][1-9][0-9]{0,5})")
_ALLOWED = "containers, numbers, strings, bytes, None and NumPy arrays of numbers or strings"


def load_restricted(path: str | os.PathLike[str]) -> Any:
    """Read a pickle that holds data only; nothing else that it names is imported or called.

    Taken are dict, list, tuple, set, frozenset, str, bytes, bytearray, bool, int, float, complex,
    None, and NumPy arrays and scalars of bool, (unsigned) int, float, complex, S or U dtypes, in any
    protocol up to 5; strings of Python 2 are read as latin-1. Arrays come out in the machine's byte
    order. Arrays of objects are refused, whatever is in them.

    Args:
        path: a file of at most 64 MiB.

    Raises:
        DataError: the file can't be read, is cut short or damaged, or is too large; or it asks for
            anything else, which the message names.
    """
    path = Path(path)
    try:
        with path.open("rb") as handle:
            content = handle.read(MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise DataError(f"{path} has more than {MOST_BYTES:,} bytes; is it the right file?")
    try:
        return _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except _RefusedError as error:
        raise DataError(
            f"{path} asks for {error}; allowed in a pickle of ground truth: {_ALLOWED}. Nothing of it "
            "was run. Get the file from its authors again"
        ) from error
    except Exception as error:  # what a damaged pickle raises is not bounded by a list
        raise DataError(
            f"{path} is no pickle, cut short or damaged ({type(error).__name__}: {error}); get it again"
        ) from error


class _RefusedError(Exception):
    """A pickle asks for what is not allowed; the text names it."""


class _Function:
    """What a pickle may call. It has no attributes that a pickle could overwrite."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("a change of a function")


class _Dtype:
    """A dtype that a pickle describes: `numpy.dtype(code, False, True)` and its state."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, align: Any = False, make_copy: Any = True) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise _RefusedError(f"a NumPy array of dtype {code!r:.60}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        # version, byte order, subarray, names, fields, item size, alignment, flags[, metadata]
        if any(part is not None for part in state[2:5]):
            raise _RefusedError("a NumPy array of records or of arrays")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray[Any, np.dtype[Any]]):
    """An array that takes its state from a pickle after a check."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_column, data = state
        order: Literal["F", "C"] = "F" if by_column else "C"
        array = _make(data, dtype, shape, order)
        content = array.tobytes(order)
        super().__setstate__((1, array.shape, array.dtype, order == "F", content))  # type: ignore[arg-type]


def _make(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
    """Make an array of its bytes, in the machine's byte order."""
    if isinstance(data, str):  # Python 2 wrote its bytes as a string, which was read as latin-1
        data = data.encode("latin1")
    if not isinstance(dtype, _Dtype) or order not in ("C", "F"):
        raise _RefusedError(f"a NumPy array of dtype {dtype!r:.60} in the order {order!r:.60}")
    if math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise _RefusedError(f"a NumPy array of shape {shape!r:.60} whose data are not that many")
    array = _Array(shape, dtype.dtype, bytes(data), order=order)
    array = array.astype(dtype.dtype.newbyteorder("="), order="K").view(_Array)
    if array.dtype.kind == "U" and array.reshape(-1).view("u4").max(initial=0) > sys.maxunicode:
        raise _RefusedError("a NumPy array with characters that don't exist")
    return array


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    return _Array(0, np.int8)  # its state follows


def _scalar(dtype: Any, data: Any) -> Any:
    return _make(data, dtype, (), "C")[()]


def _encode(text: Any, encoding: Any) -> Any:
    """Do what Python 3 asks for when it writes bytes in protocol 2."""
    if encoding != "latin1":
        raise _RefusedError(f"_codecs.encode as {encoding!r:.60}")
    return text.encode("latin1")


def _sequence(kind: Callable[..., Any]) -> _Function:
    """`bytes` or `bytearray` of what the file holds: not of a number, which fills memory with zeros."""

    def make(*arguments: Any) -> Any:
        if any(isinstance(argument, int) for argument in arguments):
            raise _RefusedError("bytes that are not in it")
        return kind(*arguments)

    return _Function(make)


ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "numpy.ndarray",  # a name for `_reconstruct`; nothing to be called
    ("numpy", "dtype"): _Function(_Dtype),
    ("_codecs", "encode"): _Function(_encode),
}
for _kind in (set, frozenset, bytes, bytearray, complex):
    _made = _sequence(_kind) if _kind in (bytes, bytearray) else _kind
    ADMITTED["builtins", _kind.__name__] = ADMITTED["__builtin__", _kind.__name__] = _made
for _core in ("numpy.core", "numpy._core"):
    ADMITTED[f"{_core}.multiarray", "_reconstruct"] = _Function(_reconstruct)
    ADMITTED[f"{_core}.multiarray", "scalar"] = _Function(_scalar)
    ADMITTED[f"{_core}.numeric", "_frombuffer"] = _Function(_make)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise _RefusedError(f"{module}.{name}")
        return ADMITTED[module, name]
