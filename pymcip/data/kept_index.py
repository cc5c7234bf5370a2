"""What is known of the images in tar shards; of many it is kept, and not found again while the shards stay.

It lies in the user's cache folder (see `pymcip.contents`), an Arrow stream and its SHA-256, and is
mapped into memory. What can't be read, or is of other shards, is found anew.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from pymcip.contents import cache_folder, digest_of, file_digest, file_states
from pymcip.data.columns import TEXTS
from pymcip.data.compact import Labels, Names
from pymcip.data.decode import image_suffixes
from pymcip.data.stores import Int64
from pymcip.data.tally import LeftOut, Tally
from pymcip.files import atomic_path, fingerprint

KEPT_FROM = 100_000  # images
_FORMAT = 1  # of what is kept; raised when shards are read in another way
_DIGEST = 32  # bytes of it, behind the stream

_log = logging.getLogger("pymcip.data")


@dataclass
class ShardIndex:
    """N images in S tar shards.

    Attributes:
        ends: int64 [S], how many images there are up to the end of each shard.
        names: of the images' members.
        offsets, sizes: int64 [N], where their bytes are.
        labels: of the images.
        titles: the captions of each, or None.
        tally: what was left out.
    """

    ends: Int64
    names: Names
    offsets: Int64
    sizes: Int64
    labels: Labels
    titles: pa.ChunkedArray | None
    tally: Tally


def kept_index(paths: Sequence[Path], find: Callable[[], ShardIndex]) -> ShardIndex:
    """Return what was kept of these shards, if they are as they were; else what `find` gives."""
    states = file_states(paths)
    if states is None:  # they are changing
        return find()
    names = [str(path) for path in paths]
    about = {
        "format": _FORMAT,
        "suffixes": sorted(image_suffixes()),
        "states": list(map(list, states)),
    }
    place = (
        cache_folder("indexes")
        / f"{fingerprint([names, [state[0] for state in states]])[:32]}.arrow"
    )
    index = None
    with contextlib.suppress(OSError, ValueError, pa.ArrowException):  # ValueError: is damaged
        index = _read(place, about)
    if index is None:
        index = find()
        if len(index.names) >= KEPT_FROM:
            with contextlib.suppress(OSError):  # it is no loss if that fails
                _write(place, about, index)
    else:
        _log.info("%d images in %d shards are known from %s", len(index.names), len(paths), place)
    return index


def _write(place: Path, about: dict[str, Any], index: ShardIndex) -> None:
    described = {
        "about": about,
        "ends": index.ends.tolist(),
        "classes": index.labels.names,
        "tally": {**asdict(index.tally), "items": [[i.key, i.reason] for i in index.tally.items]},
    }
    count = len(index.names)
    columns = {
        "name": pa.Array.from_buffers(pa.large_binary(), count, [None, *index.names.buffers()]),
        "offset": pa.array(index.offsets),
        "size": pa.array(index.sizes),
        "label": pa.array(np.asarray(index.labels.codes)),
    }
    if index.titles is not None:
        columns["titles"] = pa.concat_arrays(index.titles.chunks)
    batch = pa.record_batch(columns)
    schema = batch.schema.with_metadata({"index": json.dumps(described)})
    with atomic_path(place) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))
        digest = file_digest(temporary)
        with temporary.open("ab") as written:
            written.write(digest)


def _read(place: Path, about: dict[str, Any]) -> ShardIndex | None:
    if not place.is_file():
        return None
    content = pa.memory_map(str(place)).read_buffer()
    whole = memoryview(content)
    if digest_of(whole[:-_DIGEST]) != bytes(whole[-_DIGEST:]):
        raise ValueError("it is damaged")
    reader = pa.ipc.open_stream(content)
    described = json.loads(reader.schema.metadata[b"index"])
    if described["about"] != about:
        return None
    batch = reader.read_next_batch()
    _, ends, names = batch["name"].buffers()
    tally = described["tally"]
    titles = None
    if "titles" in batch.schema.names:
        titles = pa.chunked_array([batch["titles"]], TEXTS)
    return ShardIndex(
        np.array(described["ends"], np.int64),
        Names.of(names, np.frombuffer(ends, np.int64)),
        batch["offset"].to_numpy(),
        batch["size"].to_numpy(),
        Labels.of(batch["label"].to_numpy(), described["classes"]),
        titles,
        Tally(
            [LeftOut(*item) for item in tally["items"]],
            Counter(tally["others"]),
            tally["remarks"],
            tally["notes"],
        ),
    )
