"""Import of faiss, an optional package, and the number of threads it uses."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from pymcip.errors import MissingDependencyError

_INSTALL = 'run: pip install "pymcip[faiss]", or "pymcip[faiss-gpu]" for GPUs (one of them)'


def import_faiss() -> Any:
    """The module faiss.

    Raises:
        MissingDependencyError: it can't be imported.
    """
    try:
        with warnings.catch_warnings():  # of SWIG's types under Python 3.12 and later
            warnings.simplefilter("ignore", DeprecationWarning)
            import faiss
    except ImportError as error:
        raise MissingDependencyError(f"faiss can't be imported ({error}); {_INSTALL}") from error
    return faiss


def probe_faiss() -> str | None:
    """Why faiss can't be imported; None if it can."""
    try:
        import_faiss()
    except MissingDependencyError as error:
        return str(error)
    return None


@contextlib.contextmanager
def faiss_threads(threads: int) -> Iterator[None]:
    """Have faiss use so many threads; the setting is the whole process's, and is restored."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
