"""Files that pymcip wrote and something damaged: right, or an error that names the file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pymcip
from pymcip.contents import digest_of_files, file_digests
from pymcip.data import Captions, load_images
from pymcip.embedding import EmbeddingFolder, embed_captions, embed_images
from pymcip.errors import CheckpointError, DamagedFileError, DataError, reason_of
from pymcip.files import read_json, read_npz
from pymcip.mining import CaptionTable
from pymcip.model import ClipModel
from pymcip.ops import PackedBank
from pymcip.training.checkpoints import Position, load_checkpoint, save_checkpoint
from pymcip.training.logs import read_metrics
from tests.conftest import CAPTIONS

SLOW = [HealthCheck.function_scoped_fixture]
damage = st.tuples(st.sampled_from(["flip", "cut", "zero"]), st.floats(0, 1, exclude_max=True))


def damaged(content: bytes, how: tuple[str, float]) -> bytes:
    kind, share = how
    place = int(share * len(content))
    if kind == "cut":
        return content[:place]
    changed = content[place] ^ 0x41 if kind == "flip" else 0
    return content[:place] + bytes([changed]) + content[place + 1 :]


def checkpoint(folder: Path) -> Path:
    model = {"weight": torch.arange(64.0).reshape(8, 8)}
    state = {"model": model, "heads": {}, "optimizer": {}}
    return save_checkpoint(folder, {**vars(Position()), **state})


@given(how=damage)
@settings(max_examples=30, deadline=None, suppress_health_check=SLOW)
def test_a_damaged_checkpoint_is_right_or_refused(tmp_path: Path, how: tuple[str, float]) -> None:
    path = checkpoint(tmp_path)
    whole = load_checkpoint(path)
    path.write_bytes(damaged(path.read_bytes(), how))
    try:
        found = load_checkpoint(path)
    except CheckpointError:
        pass
    else:
        assert torch.equal(found["model"]["weight"], whole["model"]["weight"])


def test_the_same_state_gives_the_same_checkpoint(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    assert digest_of_files([first]) == digest_of_files([second])


@given(how=damage, name=st.sampled_from(["rows", "codes", "groups", "sums", "json"]))
@settings(max_examples=30, deadline=None, suppress_health_check=SLOW)
def test_a_damaged_packed_bank_is_right_or_refused(
    tmp_path: Path, how: tuple[str, float], name: str
) -> None:
    rows = np.random.default_rng(0).standard_normal((40, 70)).astype(np.float32)
    folder = tmp_path / "bank"
    bank = PackedBank.pack(rows, backend="portable")
    if not folder.exists():
        bank.save(folder)
    path = folder / ("packed_bank.json" if name == "json" else f"{name}.npy")
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, how))
    try:
        found = PackedBank.load(folder)
    except DataError:
        found = None
    finally:
        path.write_bytes(whole)
    if found is not None:
        assert np.array_equal(found.rows, rows)
        for key, array in bank.arrays.items():
            assert np.array_equal(found.arrays[key], array)


@given(how=damage)
@settings(max_examples=30, deadline=None, suppress_health_check=SLOW)
def test_a_damaged_table_is_right_or_refused(tmp_path: Path, how: tuple[str, float]) -> None:
    table = CaptionTable(
        np.array([0, 2, 3]), np.array([4, 0, 1]), np.array([0.5, 0.25, 0.5], np.float32), 5
    )
    table.save(tmp_path)
    path = tmp_path / "caption_table.npz"
    path.write_bytes(damaged(path.read_bytes(), how))
    try:
        found = CaptionTable.load(tmp_path)
    except DamagedFileError:
        pass
    else:
        assert np.array_equal(found.ids, table.ids)
        assert np.array_equal(found.cosines, table.cosines)


def test_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    good: dict[str, Any] = {
        "indptr": np.array([0, 1, 2]), "ids": np.array([0, 1]),
        "cosines": np.ones(2, np.float32), "num_captions": np.array(2),
    }  # fmt: skip
    for change in (
        {"indptr": np.array([0, 3, 2])},
        {"ids": np.array([0, 2])},
        {"ids": np.array([-1, 1])},
        {"cosines": np.array([1, np.nan], np.float32)},
        {"ids": np.array([0.0, 1.0])},
        {"indptr": np.array([], np.int64)},
    ):
        np.savez(tmp_path / "caption_table.npz", **{**good, **change})
        with pytest.raises(DamagedFileError):
            CaptionTable.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000, b'{"a": "1"}', b'{"a": true}'],
)
def test_json_that_is_not_what_was_written(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"state\.json is damaged.*Do this"):
        read_json(path, {"a": int}, "Do this")
    with pytest.raises(DamagedFileError):
        read_npz(path, {"a": ("int64", 1)})


def test_metrics_end_where_the_run_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"global_step": 1, "loss": 0.5}) + "\n"
    for tail in ('{"global_st', '{"global_step": 2}', "\0\0\0\n"):
        path.write_text(line + tail)
        assert read_metrics(path) == [{"global_step": 1, "loss": 0.5}]
    for wrong in (
        "{}\n",
        "3\n",
        "half\n",
        '{"global_step": 1, "evaluation": 3}\n',
        '{"global_step": 1, "seconds": "3"}\n',
    ):
        path.write_text(wrong + line)
        with pytest.raises(DamagedFileError, match="line 1"):
            read_metrics(path)


def test_a_damaged_run_is_named(run_options: dict[str, Any]) -> None:
    options = {**run_options, "epochs": 1, "method": "gpr"}
    out = pymcip.train(**options).out
    for name in ("config.json", "inputs.json", "result.json"):
        whole = (out / name).read_bytes()
        for content in (b"{", b"[]"):
            (out / name).write_bytes(content)
            with pytest.raises(DamagedFileError, match=rf"{name} is damaged.*overwrite=True"):
                pymcip.train(**options, resume="latest")
        (out / name).write_bytes(whole)
    (out / "result.json").write_text(json.dumps({"steps": "many"}))
    with pytest.raises(DamagedFileError, match="it has no 'method'"):
        pymcip.train(**options, resume="latest")


def test_damaged_embedding_folders_are_named(
    embedded: EmbeddingFolder, tiny_clip: ClipModel, tmp_path: Path
) -> None:
    for name in ("img_fingerprint.json", "metadata/metadata_1.parquet", "img_emb/img_emb_0.npy"):
        path = embedded.path / name
        content = path.read_bytes()
        for wrong in (b"", content[: len(content) // 2], b"\0" * 20):
            path.write_bytes(wrong)
            with pytest.raises(DataError, match=path.name):
                EmbeddingFolder(embedded.path).rows("img")
        path.write_bytes(content)
    whole = EmbeddingFolder(embedded.path).vectors("img").copy()
    for name in ("img_emb/img_emb_1.npy", "text_emb/text_emb_0.npy"):
        path = embedded.path / name
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        for read in (
            EmbeddingFolder.vectors,
            EmbeddingFolder.metadata,
            EmbeddingFolder.complete_parts,
        ):
            with pytest.raises(DamagedFileError, match=rf"{path.name} is damaged.*embed again"):
                read(EmbeddingFolder(embedded.path), path.name.split("_")[0])
        path.unlink()
    data = load_images(tmp_path / "shards")
    again = embed_images(tiny_clip, data, embedded.path, part_size=5)
    embed_captions(tiny_clip, Captions(CAPTIONS), embedded.path, part_size=3)
    assert np.array_equal(again.vectors("img"), whole)
    assert len(again.vectors("text")) == len(CAPTIONS)
    (embedded.path / "skipped.tsv").write_text("index\tkey\treason\nx\ty\n")
    with pytest.raises(DamagedFileError, match=r"skipped\.tsv"):
        print(embedded.skipped)


def test_advice_to_load_unsafely_is_not_passed_on(
    tmp_path: Path, hub_folder: Callable[..., Path]
) -> None:
    torch.save({"a": Position()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "x.pt")
    assert "weights_only" not in str(caught.value)
    assert "pymcip.training.checkpoints.Position" in str(caught.value)
    folder = hub_folder("unsafe")
    (folder / "open_clip_model.safetensors").unlink()
    (tmp_path / "x.pt").rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="Unsupported global") as refused:
        pymcip.load(f"local-dir:{folder}", device="cpu")
    assert "weights_only" not in str(refused.value)
    assert reason_of(ValueError("Use allow_pickle=True.")) == reason_of("Set weights_only=False.")


def test_digests_follow_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("pymcip.contents.KEPT_FROM", 0)
    monkeypatch.setattr("pymcip.contents.SETTLED", 0)
    paths = [tmp_path / name for name in ("a", "b", "absent")]
    for path in paths[:2]:
        path.write_bytes(b"123")

    def expected() -> list[str]:
        found = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()]
        return [*found, "00" * 32]

    def found() -> list[str]:
        return [row.tobytes().hex() for row in file_digests(paths)]

    assert found() == expected()
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1
    with monkeypatch.context() as patched:  # of files that are as they were, none is read again
        patched.setattr("os.read", None)
        assert found() == expected()
        assert np.array_equal(file_digests(paths[1::-1]), file_digests(paths[:2])[::-1])
    status = paths[0].stat()
    paths[0].write_bytes(b"124")
    os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns))  # of equal size and time
    assert found() == expected()
    (tmp_path / "c").write_bytes(b"new")
    paths.insert(2, tmp_path / "c")
    assert found() == expected()
    for kept in (tmp_path / "cache").rglob("*.npz"):
        kept.write_bytes(b"damaged")
    whole = digest_of_files(paths)
    assert found() == expected()
    assert digest_of_files(paths[::-1]) != whole == digest_of_files(paths)


def write_foreign(folder: Path, vectors: np.ndarray, parts: int = 2) -> EmbeddingFolder:
    (folder / "img_emb").mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(np.array_split(vectors, parts)):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", rows)
    return EmbeddingFolder(folder)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_foreign_rows_are_normalised_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: Any
) -> None:
    vectors = np.random.default_rng(0).normal(size=(9, 16)) * np.arange(1, 10)[:, None]
    folder = write_foreign(tmp_path, vectors.astype(dtype))
    found = folder.vectors("img")
    assert "not 1; they are normalised in memory" in caplog.text
    assert found.dtype == dtype
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(found, unit, atol=2e-3)
    caplog.clear()
    near = write_foreign(tmp_path, unit.astype(dtype))
    assert np.array_equal(near.vectors("img"), unit.astype(dtype))
    assert not caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_foreign_rows_without_a_direction_are_refused(tmp_path: Path, value: float) -> None:
    vectors = np.eye(8, dtype=np.float32)
    vectors[5] = value
    with pytest.raises(DataError, match=r"img_emb_1\.npy: row 1 "):
        write_foreign(tmp_path, vectors).parts("img")


def test_foreign_parts_must_fit_together(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path, np.eye(8, dtype=np.float32), parts=3)
    np.save(tmp_path / "img_emb" / "img_emb_2.npy", np.eye(4, dtype=np.float32))
    with pytest.raises(DataError, match=r"img_emb_2\.npy is 4 wide, img_emb_0\.npy is 8"):
        folder.parts("img")
    (tmp_path / "img_emb" / "img_emb_1.npy").unlink()
    np.save(tmp_path / "img_emb" / "img_emb_2.npy", np.eye(8, dtype=np.float32))
    with pytest.raises(DataError, match="one is missing or there twice"):
        folder.parts("img")


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ([3, 1, 0, 2], [3, 1, 0, 2]),
        ([0, 1, 0, 1], [0, 1, 2, 3]),
        ([0, None, 2, 3], [0, 1, 2, 3]),
        (["a", "b", "c", "d"], [0, 1, 2, 3]),
        ([-1, 0, 1, 2], [0, 1, 2, 3]),
    ],
)
def test_foreign_ids_number_the_rows(tmp_path: Path, index: list[Any], expected: list[int]) -> None:
    folder = write_foreign(tmp_path, np.eye(4, dtype=np.float32))
    (tmp_path / "metadata").mkdir()
    for number in range(2):
        table = pa.table({"index": index[2 * number : 2 * number + 2]})
        pa.parquet.write_table(table, tmp_path / "metadata" / f"metadata_{number}.parquet")
    assert folder.rows("img").tolist() == expected


def test_images_of_two_runs_have_the_same_bytes(
    run_options: dict[str, Any], captions_file: Callable[..., Path], tmp_path: Path
) -> None:
    options = {**run_options, "epochs": 1, "captions": str(captions_file()), "method": "mcip"}
    first, second = (pymcip.train(**{**options, "out": tmp_path / n}).out for n in ("one", "two"))
    for name in (
        "exported/state_dict.pt",
        "mined/caption_table.npz",
        "mined/caption_table.parquet",
    ):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
