"""Names and labels of very many images, in tens of bytes each; Python's own lists take over a hundred."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

UNLABELLED = -1


class Names:
    """N names of files, in 8 bytes each and their UTF-8; also such as the system can't decode."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._bytes: Any = bytearray()
        self._ends: Any = array("q", [0])
        for name in names:
            self.append(name)

    @classmethod
    def of(cls, content: pa.Buffer, ends: npt.NDArray[np.int64]) -> Names:
        """Names that `buffers` has given; none can be added."""
        names = cls()
        names._bytes, names._ends = content, ends
        return names

    def buffers(self) -> tuple[pa.Buffer, pa.Buffer]:
        """Bounds int64 [N + 1] and bytes, as Arrow's large_binary has them; nothing is copied."""
        return pa.py_buffer(self._ends), pa.py_buffer(self._bytes)

    def append(self, name: str) -> None:
        """Add a name."""
        self._bytes += name.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):
            message = f"name {row} of {len(self)}"
            raise IndexError(message)
        return str(self._bytes[self._ends[row] : self._ends[row + 1]], "utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))


class Labels:
    """The class of each of N images, or None, in 4 bytes each; a class is held once.

    Attributes:
        codes: of the images, places in `names`; -1 for None.
        names: of the classes, in the order in which they were added.
    """

    def __init__(self, labels: Iterable[str | None] = ()) -> None:
        self.codes: Any = array("i")
        self.names: list[str] = []
        self._code: dict[str | None, int] = {None: UNLABELLED}
        self.extend(labels)

    @classmethod
    def of(cls, codes: npt.NDArray[np.int32], names: list[str]) -> Labels:
        """Labels of these codes; none can be added."""
        labels = cls()
        labels.codes, labels.names = codes, names
        return labels

    def append(self, label: str | None) -> None:
        """Add an image."""
        self.codes.append(self._code_of(label))

    def extend(self, labels: Iterable[str | None]) -> None:
        """Add images."""
        self.codes.extend(map(self._code_of, labels))

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, row: int) -> str | None:
        code = self.codes[row]
        return None if code == UNLABELLED else self.names[code]

    def __setitem__(self, row: int, label: str | None) -> None:
        self.codes[row] = self._code_of(label)

    def __iter__(self) -> Iterator[str | None]:
        return (self[row] for row in range(len(self)))

    def _code_of(self, label: str | None) -> int:
        code = self._code.setdefault(label, len(self.names))
        if code == len(self.names) and label is not None:
            self.names.append(label)
        return code
