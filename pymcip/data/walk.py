"""The images of a folder: what is a picture by name or content, which folders are the user's."""

from __future__ import annotations

import os
import stat
from array import array
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pymcip.data.compact import Names
from pymcip.data.decode import kind_of_suffix, looks_like_image
from pymcip.data.labels import is_ignored
from pymcip.data.tally import Tally

States: TypeAlias = npt.NDArray[np.uint64]


class Folder:
    """A folder's images, found once.

    Attributes:
        names: of the images, below the folder, in their order: in each folder files before folders.
        states: uint64 [N, 3], see `state_of`.
        sidecars: names, below the folder, of files that may describe an image (.txt, .json).
    """

    def __init__(self, path: str, tally: Tally) -> None:
        self.path, self._tally = path, tally
        self.sidecars: set[str] = set()
        self.by_content: list[str] = []
        self.names = Names()
        states = array("Q")
        self._walk("", (os.path.realpath(path),), states)
        self.states = as_states(states)
        if self.by_content:
            tally.remarks.append(
                f"{len(self.by_content)} files are images by their content though their names do "
                f"not say so, and are taken: {', '.join(self.by_content[:5])}"
            )

    def _walk(self, below: str, chain: tuple[str, ...], states: array[int]) -> None:
        """Add the images of a subfolder (a name with "/" at its end, or ""), then those in it.

        `chain`: the real paths of the folders from the top down to this one.
        """
        folders = []
        try:
            with os.scandir(f"{self.path}/{below}") as entries:
                listed = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            self._tally.add(
                f"{self.path}/{below}", f"the folder can't be listed ({error.strerror})"
            )
            return
        while listed:  # an entry keeps what it is asked for: none is held longer than needed
            entry = listed.pop()
            name = below + entry.name
            try:
                if is_ignored(entry.name):
                    self._tally.others[f"hidden or of the system ({entry.name[:1]}…)"] += 1
                elif entry.is_dir():
                    folders.append(entry)
                elif self._is_image(entry, name):
                    states.extend(_state(entry.stat()))
                    self.names.append(name)
            except OSError as error:
                self._tally.add(entry.path, f"it can't be opened ({error.strerror})")
        for entry in folders:
            place = f"{chain[-1]}/{entry.name}"
            if entry.is_symlink():
                place = os.path.realpath(entry.path)
                if any(f"{above}/".startswith(f"{place}/") for above in chain):
                    self._tally.add(entry.path, "a link to a folder that it lies in")
                    continue
            self._walk(f"{below}{entry.name}/", (*chain, place), states)

    def _is_image(self, entry: os.DirEntry[str], name: str) -> bool:
        if not entry.is_file():
            broken = entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110
            reason = "a link to nothing" if broken else "no regular file"
            self._tally.add(entry.path, reason)
            return False
        _, dot, ending = entry.name.rpartition(".")
        suffix = f".{ending.lower()}" if dot else ""
        kind = kind_of_suffix(suffix)
        if kind == "image":
            return True
        if suffix in (".txt", ".json"):
            self.sidecars.add(name)
        if kind == "other":
            self._tally.others[suffix] += 1
            return False
        if kind == "unknown" and looks_like_image(entry.path):
            self.by_content.append(name)
            return True
        reason = "no kind of image that Pillow reads here" + (
            "; install pillow-heif" if suffix in (".heic", ".heif") else ""
        )
        self._tally.add(entry.path, reason)
        return False


def state_of(path: str) -> tuple[int, int, int]:
    """Return device, inode and size of a regular file; raises OSError if it is missing or none."""
    status = os.stat(path)  # noqa: PTH116  a million times
    if not stat.S_ISREG(status.st_mode):
        raise OSError(0, "no regular file")
    return _state(status)


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_size


def as_states(numbers: array[int]) -> States:
    """Return what `state_of` says of N files, one after the other, as uint64 [N, 3]."""
    return np.frombuffer(numbers, np.uint64).reshape(-1, 3)


def class_folder(name: str) -> str | None:
    """Return the first folder of a name below the source's, which is the class; None without."""
    first, slash, _ = name.partition("/")
    return first if slash else None
