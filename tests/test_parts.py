"""Several processes, or several calls, for one embedding folder and one caption table."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pymcip
from pymcip import parts, workers
from pymcip.cli import main
from pymcip.data import load_images
from pymcip.embedding import EmbeddingFolder, embed_images
from pymcip.errors import ConfigError, DataError, StaleEmbeddingsError
from pymcip.mining import mine, mine_table
from pymcip.model import ClipModel
from pymcip.parts import own_shard
from tests.conftest import files
from tests.mining_cases import clustered, options, split

RUN = """
import json, sys
import pymcip
embed, mine, evaluate = json.loads(sys.argv[1])
pymcip.embed(**embed)
found = [pymcip.mine_captions(**mine).report, pymcip.evaluate(**evaluate).metrics]
print(json.dumps(found))
"""


def made(folder: Path) -> dict[str, bytes]:
    """The files of a stage, without pymcip's own list of them."""
    return {name: content for name, content in files(folder).items() if ".pymcip-" not in name}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shards_embed_what_one_call_does(
    order: tuple[int, ...], tiny_clip: ClipModel, ten_images: Path, tmp_path: Path
) -> None:
    data, out = load_images(ten_images), tmp_path / "out"
    whole = embed_images(tiny_clip, data, tmp_path / "whole", part_size=2)
    for done, number in enumerate(order):
        folder = embed_images(tiny_clip, data, out, part_size=2, shard=(number, 3))
        names = {path.name for path in (out / "metadata").iterdir()}
        assert {f"metadata_{p}.parquet" for p in range(number, 5, 3)} <= names
        if done < 2:
            assert folder.part_counts("img")[0] < 5
            with pytest.raises(DataError, match=r"holds \d of 5 parts of images"):
                folder.parts("img")
    assert folder.skipped == whole.skipped
    assert len(whole.skipped) == 1
    assert made(out) == made(whole.path)


def test_a_shard_without_parts_finds_a_folder_that_another_has_just_begun(
    tiny_clip: ClipModel, ten_images: Path, tmp_path: Path
) -> None:
    data, out = load_images(ten_images), tmp_path / "out"
    whole = embed_images(tiny_clip, data, tmp_path / "whole")
    out.mkdir()
    shutil.copy(whole.path / "img_fingerprint.json", out)
    assert embed_images(tiny_clip, data, out, shard=(1, 2)).part_counts("img") == (0, 1)
    embed_images(tiny_clip, data, out, shard=(0, 2))
    assert made(out) == made(whole.path)


def test_another_number_of_shards_makes_what_is_missing(
    tiny_clip: ClipModel, ten_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = load_images(ten_images), tmp_path / "out"
    whole = embed_images(tiny_clip, data, tmp_path / "whole", part_size=2)
    embed_images(tiny_clip, data, out, part_size=2, shard=(1, 3))
    embed_images(tiny_clip, data, out, part_size=2, shard=(7, 8))  # has nothing to do
    read: list[int] = []
    original = type(data).read_with_digest

    def counting_read(self: Any, index: int) -> Any:
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(type(data), "read_with_digest", counting_read)
    for number in range(2):
        embed_images(tiny_clip, data, out, part_size=2, shard=(number, 2))
    assert sorted(read) == [0, 1, 4, 5, 6, 7]
    assert made(out) == made(whole.path)
    with pytest.raises(StaleEmbeddingsError, match="another part_size"):
        embed_images(tiny_clip, data, out, part_size=3, shard=(1, 2))


def test_tasks_do_not_change_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal cosines of captions in several ranges are ordered as in one."""
    images, captions = clustered(0, 23, 41)
    captions = np.concatenate([captions, captions[5:15], captions[:3]])
    whole, report = mine_table([images], [captions], k=4, threshold=0.3)
    ties = sum(len(np.unique(whole[row][1])) < len(whole[row][1]) for row in range(23))
    assert ties
    for block_rows, bank_rows in [(23, 20), (5, 7), (8, 1)]:
        table, same = mine_table(
            split(images, [6]), split(captions, [9, 0, 20]), k=4, threshold=0.3,
            block_rows=block_rows, bank_rows=bank_rows,
        )  # fmt: skip
        for name in ("indptr", "ids", "cosines"):
            assert np.array_equal(getattr(table, name), getattr(whole, name))
        assert same == report


def test_shards_mine_what_one_call_does(
    embedded: EmbeddingFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mine, "BANK_ROWS", 3)
    monkeypatch.setattr(mine, "images_per_block", lambda *_: 5)
    whole = pymcip.mine_captions(**options(embedded, tmp_path, out=tmp_path / "whole"))
    for number in (2, 0):
        result = pymcip.mine_captions(**options(embedded, tmp_path, shard=f"{number}/3"))
        assert result.missing == {2: 6, 0: 3}[number]
        assert result.markdown.startswith(f"{result.missing} tasks are not done yet")
        with pytest.raises(DataError, match=r"has no table yet: \d of its tasks are not done"):
            _ = result.table
    with pytest.raises(StaleEmbeddingsError, match="another k"):
        pymcip.mine_captions(**options(embedded, tmp_path, k=1, shard="1/2"))
    result = pymcip.mine_captions(**options(embedded, tmp_path, shard="1/2"))
    result = pymcip.mine_captions(**options(embedded, tmp_path, shard="0/2"))
    assert result.report == whole.report
    assert made(result.out) == made(whole.out)


def test_the_command_of_a_shard_says_what_is_missing(
    tiny_model_dir: Path, ten_images: Path, embedded: EmbeddingFolder, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = ["--model", f"local-dir:{tiny_model_dir}", "--device", "cpu", "--part-size", "4"]
    out = str(tmp_path / "e")
    assert main(["embed", *model, "--images", str(ten_images), "--out", out, "--shard", "1/3"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "out": out, "skipped": 0, "images": "1 of 3 parts",
    }  # fmt: skip
    monkeypatch.setattr(mine, "BANK_ROWS", 4)
    out = str(tmp_path / "m")
    assert main(["mine", "--images", str(embedded.path), "--out", out, "--shard", "1/2"]) == 0
    table, line = capsys.readouterr().out.splitlines()
    assert table == "1 tasks are not done yet; other shards have to do them."
    assert json.loads(line) == {"threshold": 0.27, "out": out, "missing": 1}


def test_ranks_embed_mine_and_evaluate_as_one_process(
    tiny_model_dir: Path, ten_images: Path, captions_file: Callable[..., Path], tmp_path: Path
) -> None:
    def stages(folder: Path) -> list[dict[str, Any]]:
        model = {"model": f"local-dir:{tiny_model_dir}", "device": "cpu"}
        embed = {
            **model, "images": str(ten_images), "part_size": 3, "captions": str(captions_file()),
            "out": str(folder / "e"),
        }  # fmt: skip
        mine_options = {"images": str(folder / "e"), "out": str(folder / "m"), "threshold": -1.0}
        evaluate = {
            **model, "data": str(ten_images), "out": str(folder / "v"), "cache": str(folder / "c"),
        }  # fmt: skip
        return [embed, mine_options, evaluate]

    embed, mine_options, evaluate = stages(tmp_path / "whole")
    pymcip.embed(**embed)
    figures = [pymcip.mine_captions(**mine_options).report, pymcip.evaluate(**evaluate).metrics]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, json.dumps(stages(tmp_path / "ranks"))],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            cwd=tmp_path,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in ranks:
        output, _ = process.communicate(timeout=540)
        assert process.returncode == 0
        assert json.loads(output) == figures
    for stage in ("e", "m", "c"):
        found, whole = made(tmp_path / "ranks" / stage), made(tmp_path / "whole" / stage)
        if stage == "m":  # how many images a task has depends on who began
            assert found.pop("mine.json") != whole.pop("mine.json")
        assert found == whole
    assert {path.name for path in (tmp_path / "ranks" / "v").iterdir()} >= {
        "metrics.json",
        "table.md",
    }


def test_a_shard_of_ranks_is_a_share_of_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_shard(None) == (0, 1)
    assert own_shard("2/3") == (2, 3)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert own_shard("2/3") == (2, 3)  # a process that has not joined the others works alone
    monkeypatch.setattr(parts, "waiting_group", object)
    shares = set()
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        assert own_shard(None) == (rank, 4)
        shares |= {own_shard(f"{number}/3") for number in range(3)}
    assert shares == {(number, 12) for number in range(12)}


@pytest.mark.parametrize("shard", ["3/3", "1", "a/2", "-1/2", "1/0", "0/1/2", "/", "²/3"])
def test_odd_shards_are_refused(shard: str) -> None:
    with pytest.raises(ConfigError, match=r"allowed: i/n, with i from 0 to n - 1"):
        pymcip.mine_captions(images="e", out="o", shard=shard)


def test_what_shards_cannot_do_is_refused(
    embedded: EmbeddingFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="overwrite=True with 2 processes"):
        pymcip.mine_captions(**options(embedded, tmp_path, shard="0/2", overwrite=True))
    with pytest.raises(ConfigError, match="overwrite=True with 2 processes"):
        pymcip.embed(model="m", images="i", out="o", shard="0/2", overwrite=True)
    with pytest.raises(ConfigError, match=r"recall=0\.9 with 2 processes: one process builds"):
        pymcip.mine_captions(**options(embedded, tmp_path, shard="0/2", recall=0.9))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"started as 2 processes, .* give cache="):
        pymcip.evaluate("m", data="d")


@pytest.mark.parametrize("command", ["export", "index", "search", "demo", "check", "runs", "sweep"])
def test_commands_of_one_process_refuse_ranks_by_name(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command]) == 2
    assert f"pymcip {command}: it runs in one process, and torchrun" in capsys.readouterr().err


def test_decoding_processes_share_the_cores_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, gpu, local, expected in [
        (2, False, 1, 0), (2, True, 1, 2), (8, False, 1, 8), (8, False, 4, 0), (96, True, 1, 16),
        (96, True, 8, 12), (8, True, 16, 0),
    ]:  # fmt: skip
        monkeypatch.setattr(workers, "usable_cores", lambda cores=cores: cores)
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        assert workers.decoding_processes("auto") == expected
        assert workers.decoding_processes(3) == 3
