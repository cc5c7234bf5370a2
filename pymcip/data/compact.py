"""Names and labels of very many images, in tens of bytes each; Python's own lists take over a hundred."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

UNLABELLED = -1


class Names:
    """N names of files, in 8 bytes each and their UTF-8; also such as the system can't decode."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])
        for name in names:
            self.append(name)

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
        return self._bytes[self._ends[row] : self._ends[row + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))


class Labels:
    """The class of each of N images, or None, in 4 bytes each; a class is held once.

    Attributes:
        codes: of the images, places in `names`; -1 for None.
        names: of the classes, in the order in which they were added.
    """

    def __init__(self, labels: Iterable[str | None] = ()) -> None:
        self.codes, self.names = array("i"), list[str]()
        self._code: dict[str | None, int] = {None: UNLABELLED}
        self.extend(labels)

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
