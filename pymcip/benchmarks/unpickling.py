"""Pickles from the internet, read without running anything that they name.

A pickle is a program: it may import and call whatever it likes. This reader first walks over the
program without running it and refuses instructions that plain data don't need; then it runs it with
inert stand-ins in place of the few NumPy functions that arrays need, so that not even NumPy's own
`__setstate__` (which trusts its input) sees what the file holds; and last it makes the arrays
itself, from bytes whose number, shape and dtype agree.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pymcip.errors import DataError

MOST_BYTES = 64 << 20  # ground truth of 11,000 images takes half a megabyte
DEEPEST = 32
_PLAIN = (str, bytes, bytearray, bool, int, float, complex, type(None))
_DTYPE = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248]|c(?:8|16)|[SU][1-9][0-9]{0,5})")
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_REFUSED = {  # what instructions do that data don't need, of pickletools' names
    "PERSID": "an object kept elsewhere",
    "BINPERSID": "an object kept elsewhere",
    "EXT1": "a class by number",
    "EXT2": "a class by number",
    "EXT4": "a class by number",
    "INST": "an instance of a class",
    "OBJ": "an instance of a class",
    "NEWOBJ": "an instance of a class",
    "NEWOBJ_EX": "an instance of a class",
    "NEXT_BUFFER": "a buffer from outside",
    "READONLY_BUFFER": "a buffer from outside",
}
_OPEN = object()  # in place of a container whose parts are being resolved
_ALLOWED = "containers, numbers, strings, bytes, None and NumPy arrays of numbers or strings"


def load_restricted(path: str | os.PathLike[str]) -> Any:
    """Read a pickle that holds data only; nothing that it names is imported or called.

    Taken are dict, list, tuple, set, frozenset, str, bytes, bytearray, bool, int, float, complex,
    None, and NumPy arrays and scalars of bool, (unsigned) int, float, complex, S or U dtypes, in any
    protocol up to 5; strings of Python 2 are read as latin-1. Arrays come out in the machine's byte
    order. Arrays of objects are refused, whatever is in them.

    Args:
        path: a file of at most 64 MiB.

    Returns:
        The object; parts that are one object in the pickle are one here.

    Raises:
        DataError: the file can't be read, is cut short or damaged, is too large, nested deeper than
            32 or holds itself; or it asks for anything else, which the message names.
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
        _check_instructions(content)
        loaded = Unpickler(io.BytesIO(content), encoding="latin1").load()
        return _Resolver().resolve(loaded, 0)
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


def _instructions(content: bytes) -> Iterator[tuple[str, Any]]:
    """Yield each instruction's name and argument, as `pickletools.genops` does.

    But genops takes the strings of Python 2's protocol 0 for ASCII.
    """
    stream = io.BytesIO(content)
    name = ""
    while name != "STOP":
        code = stream.read(1).decode("latin1")
        if code not in _OPCODES:
            raise ValueError(f"{code!r} is no instruction" if code else "it has no end")
        instruction = _OPCODES[code]
        name = instruction.name
        if name == "STRING":
            yield name, stream.readline()
        else:
            yield name, None if instruction.arg is None else instruction.arg.reader(stream)


def _check_instructions(content: bytes) -> None:
    """Refuse, before anything runs, instructions that data don't need and memory they don't fill."""
    for name, argument in _instructions(content):
        if name in _REFUSED:
            raise _RefusedError(f"{_REFUSED[name]} ({name} {argument!r:.60})")
        # The unpickler makes its memo as large as the highest number, here of as many gigabytes as
        # it likes; a pickler counts from 0.
        if "PUT" in name and int(argument) > len(content):
            raise _RefusedError(f"a memo of {argument} entries in {len(content)} bytes")


class _Function:
    """What the pickle may call. An instance, so that it has no attributes to be overwritten."""

    __slots__ = ("call", "name")

    def __init__(self, name: str, call: Callable[..., Any]) -> None:
        self.name = name
        self.call = call

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self.call(*arguments)
        except (TypeError, ValueError) as error:
            raise _RefusedError(f"{self.name} with arguments of another kind ({error})") from error

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError(f"a change of {self.name}")


class _Dtype:
    """A dtype that a pickle describes: `numpy.dtype(code, False, True)` and its state."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, align: Any = False, make_copy: Any = True) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise _RefusedError(f"a NumPy array of dtype {code!r:.60}")
        self.code = code
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        # version, byte order, subarray, names, fields, item size, alignment, flags[, metadata]
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "=", "|"):
            raise _RefusedError(f"a NumPy dtype with the state {state!r:.60}")
        if any(part is not None for part in state[2:5]):
            raise _RefusedError("a NumPy array of records or of arrays")
        self.order = state[1]

    def make(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


class PickledArray:
    """An array, or a scalar (shape None), that a pickle describes."""

    __slots__ = ("data", "dtype", "order", "shape")

    def __init__(self, dtype: Any, shape: Any, data: Any, order: Any = "C") -> None:
        self.describe(dtype, shape, data, order)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_column, data = state
        self.describe(dtype, shape, data, "F" if by_column else "C")

    def describe(self, dtype: Any, shape: Any, data: Any, order: Any) -> None:
        if not isinstance(dtype, _Dtype):
            raise _RefusedError(f"a NumPy array with {dtype!r:.60} for a dtype")
        self.dtype, self.shape, self.order = dtype, shape, order
        # Python 2 wrote its bytes as a string, which was read as latin-1.
        self.data = data.encode("latin1") if isinstance(data, str) else data

    def make(self) -> Any:
        dtype = self.dtype.make()
        shape = () if self.shape is None else self.shape
        if (
            not isinstance(shape, tuple)
            or any(type(size) is not int or size < 0 for size in shape)
            or not isinstance(self.data, (bytes, bytearray))
            or math.prod(shape) * dtype.itemsize != len(self.data)
            or self.order not in ("C", "F")
        ):
            raise _RefusedError(
                f"a NumPy array of shape {shape!r:.60} whose data are not that many"
            )
        array: npt.NDArray[Any] = np.ndarray(shape, dtype, bytes(self.data), order=self.order)
        native = array.astype(dtype.newbyteorder("="), order="K", copy=True)
        if dtype.kind == "U" and native.reshape(-1).view("u4").max(initial=0) > sys.maxunicode:
            raise _RefusedError("a NumPy array with characters that don't exist")
        return native[()] if self.shape is None else native


def _reconstruct(kind: Any, shape: Any = (0,), code: Any = b"b") -> PickledArray:
    if kind is not FUNCTIONS["numpy", "ndarray"]:
        raise _RefusedError(f"an array of the class {kind!r:.60}")
    return PickledArray(_Dtype("i1"), (0,), b"")  # its state follows


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> PickledArray:
    return PickledArray(dtype, shape, data, order)


def _scalar(dtype: Any, data: Any) -> PickledArray:
    return PickledArray(dtype, None, data)


def _encode(text: Any, encoding: Any) -> bytes:
    """Do what Python 3 asks for when it writes bytes in protocol 2."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise _RefusedError(f"_codecs.encode of {type(text).__name__} as {encoding!r:.60}")
    return text.encode("latin1")


def _never(*arguments: Any) -> Any:
    raise _RefusedError("a call of numpy.ndarray")


def _container(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Make a set of a list, bytes of bytes, a number of numbers; no other argument is taken."""

    def make(*arguments: Any) -> Any:
        allowed = (list, tuple, bytes, float)
        if any(type(item) not in allowed for item in arguments) or (
            len(arguments) > 1 and kind is not complex
        ):
            raise ValueError(f"got {[type(item).__name__ for item in arguments]}")
        return kind(*arguments)

    return make


_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _never,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    **{
        (module, kind.__name__): _container(kind)
        for module in ("builtins", "__builtin__")
        for kind in (set, frozenset, bytes, bytearray, complex)
    },
    **{
        (f"numpy.{core}.{module}", name): maker
        for core in ("core", "_core")
        for module, name, maker in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}
FUNCTIONS = {name: _Function(".".join(name), maker) for name, maker in _MAKERS.items()}


class Unpickler(pickle.Unpickler):
    """An unpickler that finds the stand-ins and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in FUNCTIONS:
            return FUNCTIONS[module, name]
        raise _RefusedError(f"{module}.{name}")


class _Resolver:
    """Puts arrays in the places of their stand-ins, and lets nothing but data through."""

    def __init__(self) -> None:
        self._done: dict[int, Any] = {}  # by id: what is shared is resolved once

    def resolve(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if depth > DEEPEST:
            raise _RefusedError(f"containers nested deeper than {DEEPEST}")
        if id(value) in self._done:
            found = self._done[id(value)]
            if found is _OPEN:
                raise _RefusedError(f"a {kind.__name__} that holds itself")
            return found
        self._done[id(value)] = _OPEN
        if kind is PickledArray:
            result = value.make()
        elif kind is dict:
            result = {
                self.resolve(key, depth + 1): self.resolve(part, depth + 1)
                for key, part in value.items()
            }
        elif kind in (list, tuple, set, frozenset):
            result = kind([self.resolve(part, depth + 1) for part in value])
        elif kind is _Dtype:
            raise _RefusedError("a NumPy dtype by itself")
        else:
            raise _RefusedError(f"a {kind.__name__}" if kind is not _Function else "a function")
        self._done[id(value)] = result
        return result
