"""Restricted pickles: what data need is read, everything else is refused and never run."""

from __future__ import annotations

import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pymcip.benchmarks import unpickling
from pymcip.benchmarks.unpickling import load_restricted
from pymcip.errors import DataError

Write = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Write:
    def write(content: Any, protocol: int = 4) -> Path:
        path = tmp_path / "gnd.pkl"
        path.write_bytes(
            content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol)
        )
        return path

    return write


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_restricted(path)
    return str(caught.value)


# What is read


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_come_back_as_they_are(written: Write, protocol: int) -> None:
    value = {
        "imlist": ["all_souls_000013", "é"],
        "numbers": [0, -1, 300, 1 << 70, 2.5, 1e300, True, False, None, 1 - 2j],
        "nested": ((), (1,), (1, 2, 3, 4), [], {}, {1: {2: [3]}}),
        "sets": [{1, 2}, frozenset({"a"}), set()],
        "bytes": [b"", b"\x00\xff"],
        7: "a number for a key",
    }
    assert load_restricted(written(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(5),
        np.array([], np.float64),
        np.arange(6, dtype=np.uint16).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(24, dtype=np.int8).reshape(2, 3, 4).transpose(1, 2, 0)[::2],
        np.array([1, 70_000], ">i4"),
        np.array([True, False]),
        np.array(["é", "bcd"]),
        np.array(["wide"], ">U6"),
        np.array([b"a", b"bc"]),
        np.array(7),
        np.array([1 + 2j], np.complex64),
        np.float32(1.5),
        np.int64(-3),
        np.str_("x"),
    ],
    ids=str,
)
def test_arrays_come_back_as_they_are(written: Write, array: Any, protocol: int) -> None:
    found = load_restricted(written({"a": array}, protocol))["a"]
    assert isinstance(found, type(array))
    np.testing.assert_array_equal(found, array, strict=array.dtype.isnative)
    assert found.dtype.isnative
    if isinstance(found, np.ndarray):
        found[...] = found  # writable: its bytes are its own


# cPickle.dumps({"junk": numpy.array([1, 200], "u2"), "bbx": [1.5], "\xe9": None}) in protocols 0
# and 2, by Python 2.7 and NumPy 1.16: strings of bytes, also for the array's data.
PYTHON_2 = {
    0: (
        b"(dp1\nS'\\xe9'\nNsS'junk'\np2\ncnumpy.core.multiarray\n_reconstruct\np3\n(cnumpy\nndarray\n"
        b"p4\n(I0\ntS'b'\ntRp5\n(I1\n(I2\ntcnumpy\ndtype\np6\n(S'u2'\nI0\nI1\ntRp7\n(I3\nS'<'\nNNN"
        b"I-1\nI-1\nI0\ntbI00\nS'\\x01\\x00\\xc8\\x00'\ntbsS'bbx'\np8\n(lp9\nF1.5\nas."
    ),
    2: (
        b"\x80\x02}q\x01(U\x01\xe9NU\x04junkq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\n"
        b"ndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x02\x85cnumpy\ndtype\nq\x06U\x02u2K\x00K"
        b"\x01\x87Rq\x07(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x04\x01\x00"
        b"\xc8\x00tbU\x03bbxq\x08]q\tG?\xf8\x00\x00\x00\x00\x00\x00au."
    ),
}


@pytest.mark.parametrize("protocol", PYTHON_2)
def test_a_pickle_of_python_2_is_read(written: Write, protocol: int) -> None:
    found = load_restricted(written(PYTHON_2[protocol]))
    assert set(found) == {"junk", "bbx", "é"}
    assert found["junk"].tolist() == [1, 200]
    assert found["junk"].dtype == np.uint16
    assert found["bbx"] == [1.5]


def test_what_is_shared_stays_shared(written: Write) -> None:
    row = [1]
    found = load_restricted(written([row, row, np.arange(2)]))
    assert found[0] is found[1]


# What is refused


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_call_of_the_system_is_refused_and_not_made(
    written: Write, tmp_path: Path, protocol: int
) -> None:
    trace = tmp_path / "trace"
    message = refusal(written({"gnd": [Calls(os.system, f"touch {trace}")]}, protocol))
    assert "posix.system" in message
    assert "allowed in a pickle of ground truth: containers" in message
    assert not trace.exists()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (eval, ("1",)),
        (exec, ("1",)),
        (getattr, ("", "join")),
        (open, ("gnd",)),
        (np.load, ("x.npy",)),
        (np.array, ([1],)),
        (np.fromfile, ("x",)),
        (pickle.loads, (b"N.",)),
        (OrderedDict, ()),
        (list, ((1,),)),
        (Path, ("a",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_functions_are_refused(written: Write, function: Any, arguments: Any) -> None:
    message = refusal(written(Calls(function, *arguments)))
    assert str(function.__name__) in message
    assert "Nothing of it was run" in message


def test_a_call_within_the_arguments_of_an_array_is_refused(written: Write, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    inner = Calls(os.system, f"touch {trace}")
    reconstruct = np.zeros(1).__reduce__()[0]
    assert "posix.system" in refusal(written(Calls(reconstruct, np.ndarray, (inner,), b"b")))
    assert "posix.system" in refusal(written(Calls(np.dtype, inner)))
    assert not trace.exists()


def test_arrays_of_objects_and_of_records_are_refused(written: Write) -> None:
    assert "dtype 'O8'" in refusal(written(np.array([[1], None], object)))
    assert "dtype 'V16'" in refusal(written(np.zeros(2, [("a", "i8"), ("b", "f8")])))
    assert "dtype 'M8'" in refusal(written(np.array(["2020"], "M8[s]")))


def test_subclasses_and_instances_are_refused(written: Write) -> None:
    assert "numpy.ma" in refusal(written(np.ma.masked_array([1])))
    assert "Instance" in refusal(written(Instance()))
    assert "numpy.matrix" in refusal(written(Calls(np.zeros(1).__reduce__()[0], np.matrix, (0,))))


class Instance:
    pass


def test_numpys_class_of_arrays_is_not_called(written: Write) -> None:
    assert "not callable" in refusal(written(b"\x80\x02cnumpy\nndarray\nK\x02\x85R."))


@pytest.mark.parametrize("name", sorted(unpickling.ADMITTED), ids=".".join)
def test_what_is_admitted_can_be_neither_changed_nor_subclassed(
    written: Write, name: tuple[str, str]
) -> None:
    push = b"\x80\x02c" + "\n".join(name).encode() + b"\n"
    for state in (
        b"}U\x05_callK\x01s",
        b"N}U\x05_callK\x01s\x86",
    ):  # a dict, and (None, attributes)
        assert "gnd.pkl" in refusal(written(push + state + b"b."))
        assert not isinstance(getattr(unpickling.ADMITTED[name], "_call", None), int)
    if not isinstance(unpickling.ADMITTED[name], type):
        assert "NEWOBJ" in refusal(written(push + b")\x81."))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"Psecret\n.", "persistent"),
        (b"\x80\x02U\x01xQ.", "persistent"),
        (b"\x80\x02\x82\x01.", "extension"),
        (b"(ios\nsystem\n.", "os.system"),
        (b"(cos\nsystem\nU\x01xo.", "os.system"),
        (b"\x80\x05\x97.", "buffer"),
        (b"\x80\x02cnumpy\ndtype.type\n.", "numpy.dtype.type"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-8\x86R.", "'utf-8'"),
    ],
)
def test_instructions_that_data_dont_need_are_refused(
    written: Write, content: bytes, named: str
) -> None:
    assert named in refusal(written(content))


# Files that are damaged or made to do damage


@pytest.mark.parametrize("protocol", range(6))
def test_a_file_that_is_cut_short_is_refused(written: Write, protocol: int) -> None:
    whole = pickle.dumps({"a": [1, 2, "three"], "b": np.arange(3)}, protocol)
    for size in range(len(whole)):
        assert "gnd.pkl" in refusal(written(whole[:size]))
    assert load_restricted(written(whole))["a"] == [1, 2, "three"]


def test_other_files_are_refused(written: Write, tmp_path: Path) -> None:
    message = refusal(written(b"<html>404 Not Found</html>"))
    assert "is no pickle, cut short or damaged (UnpicklingError: invalid load key, '<'" in message
    assert "is no pickle, cut short or damaged (EOFError" in refusal(written(b""))
    assert "can't be read: No such file" in refusal(tmp_path / "absent.pkl")
    assert "can't be read: Is a directory" in refusal(tmp_path)


def test_a_file_that_is_too_large_is_refused(
    written: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(list(range(100)))
    monkeypatch.setattr(unpickling, "MOST_BYTES", 50)
    assert "more than 50 bytes" in refusal(path)


def test_memory_that_the_file_does_not_fill_is_refused(written: Write) -> None:
    assert "cut short" in refusal(written(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x."))
    huge = Calls(np.zeros(1).__reduce__()[0], np.ndarray, (0,), b"b")
    content = pickle.dumps(huge, 2)[:-1] + (
        b"(K\x01\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85"
        b"cnumpy\ndtype\nU\x02i8K\x00K\x01\x87R\x89U\x08"
        b"01234567tb."
    )
    assert "shape (1099511627776,) whose data are not that many" in refusal(written(content))


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_bytes_that_the_file_does_not_hold_are_refused(written: Write, kind: Any) -> None:
    assert "bytes that are not in it" in refusal(written([Calls(kind, 1 << 40)]))


def test_an_array_of_characters_that_dont_exist_is_refused(written: Write) -> None:
    content = pickle.dumps(np.array(["\U0010ffff"], "<U1"), 4)
    assert load_restricted(written(content)) == ["\U0010ffff"]
    assert "characters" in refusal(written(content.replace(b"\xff\xff\x10\0", b"\xff\xff\x11\0")))


def test_numpys_own_dtypes_stay_as_they_are(written: Write) -> None:
    """`numpy.dtype("i8")` is one object for all; a pickle may say that its byte order is another."""
    content = b"\x80\x02cnumpy\ndtype\nU\x02i8\x85R(K\x03U\x01>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb."
    load_restricted(written(content))
    assert np.dtype("i8").isnative


def test_bytes_are_not_taken_for_objects(written: Write) -> None:
    """NumPy's own `__setstate__` believes the flags, by which bytes could become pointers."""
    content = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01\x85cnumpy\ndtype\nU\x02O8\x85R(K\x03U\x01|NNNK\x08K\x08K\x00tb\x89U\x0801234567tb."
    )
    assert "dtype 'O8'" in refusal(written(content))
