"""Mining at its full size: N images, M captions from the disk, a kill in the middle, resumed.

`pymcip mine` runs in a process of its own, with a limit on its memory. Once some blocks of images are finished it gets SIGKILL in
the middle of the next one and is started again. The embeddings resemble a model's
(`mining_data.py`) and lie on the disk as `pymcip embed` leaves them: fp16, in parts. Recall is the
share of the pairs in an fp64 ranking of some images that were found.

The rivals answer a part of the same problem, all in one run; their seconds for the whole of it are
computed from that, and marked so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Report, Rival, common_arguments, compare
from mining_data import generate
from topk_rivals import CONTENDERS, MissingRivalError, Problem, product_alone

from pymcip.embedding import EmbeddingFolder
from pymcip.mining import CaptionTable, images_per_block, search_device
from pymcip.ops import topk
from pymcip.ops.arrays import MatrixParts, torch_threads

FULL = {"images": 100_000, "captions": 12_000_000, "dim": 512, "part_rows": 100_000}
SMOKE = {"images": 70_000, "captions": 6_000, "dim": 32, "part_rows": 1_500}
GEMM_ROWS = 20_000
RIVALS = ("faiss IndexFlatIP", "faiss-gpu fp16", "torch bf16")
POLL = 0.02  # seconds between looks at the mining process


# --------------------------------------------------------------------------------------------------
# Mining, watched


@dataclass
class Watched:
    """One process: what it took, until it ended or was killed."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of all threads: what it takes whoever else wants the cores
    killed: bool = False
    since_block: float = 0.0  # from the last finished block to the kill
    peak: dict[str, int] = field(default_factory=dict)  # bytes, by /proc/PID/status's names


def mine(options: argparse.Namespace, folder: Path, out: Path, kill_at: float | None) -> Watched:
    """Run `pymcip mine`; kill it when that share of the blocks, and half a block more, is done."""
    folder, out = folder.resolve(), out.resolve()
    command = [sys.executable, "-m", "pymcip", "mine", "--images", folder, "--out", out]
    command += ["--k", options.k, "--threshold", options.threshold, "--backend", options.backend]
    command += ["--threads", options.threads]
    watched = Watched()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)),
        start_new_session=True,
        cwd=out.parent,  # in the repository, -m would take its folder for the package
    )
    if options.memory_limit:
        limit = int(options.memory_limit * 2**30)
        resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, limit))
    rows = images_per_block(options.k, options.dim, torch.device(options.device))
    planned = -(-options.images // rows)
    due = None if kill_at is None else max(1, round(kill_at * planned))
    last, finished, spacing = start, 0, 0.0
    while process.poll() is None:
        time.sleep(POLL)
        _remember(process.pid, watched.peak)
        now = time.perf_counter()
        done = len(list(out.glob("blocks/images_*.npz")))
        if done > finished:
            spacing, last, finished = (now - last) / (done - finished), now, done
        if due is not None and done >= due and now - last >= spacing / 2:
            process.send_signal(signal.SIGKILL)
            watched.killed, watched.since_block = True, now - last
            break
    process.wait()
    watched.seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    watched.cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if process.returncode != 0 and not watched.killed:
        raise SystemExit(f"pymcip mine failed ({process.returncode})")
    return watched


def _remember(pid: int, peak: dict[str, int]) -> None:
    """The highest of each figure so far. VmHWM counts pages of the page cache that are mapped."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("VmHWM", "RssAnon", "RssFile"):
                peak[name] = max(peak.get(name, 0), int(value.split()[0]) * 1024)


# --------------------------------------------------------------------------------------------------
# Correctness, ceiling, rivals


def fp64_recall(
    options: argparse.Namespace, folder: EmbeddingFolder, table: CaptionTable
) -> dict[str, Any]:
    """Compare a sample of the images with their ranking in fp64, scores rounded to fp32."""
    chosen = np.linspace(0, len(table) - 1, min(options.checked, len(table))).astype(np.int64)
    queries = torch.from_numpy(folder.vectors("img")[chosen].astype(np.float64))
    best = torch.empty(len(chosen), 0, dtype=torch.float32)
    ids = torch.empty(len(chosen), 0, dtype=torch.int64)
    for first, block in MatrixParts(folder.parts("text")).blocks(16_384):
        rows = torch.from_numpy(block.astype(np.float64))
        more, places = (queries @ rows.T).float().sort(dim=1, descending=True, stable=True)
        best = torch.cat([best, more[:, : options.k]], 1)
        ids = torch.cat([ids, places[:, : options.k] + first], 1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, ids = best[:, : options.k], ids.gather(1, order)[:, : options.k]
    due = hits = same = 0
    for row, image in enumerate(chosen):
        wanted = ids[row][best[row] >= np.float32(options.threshold)].tolist()
        found = table[int(image)][0].tolist()
        due += len(wanted)
        hits += len(set(wanted) & set(found))
        same += wanted == found
    return {
        "recall": hits / due if due else None,
        "images": len(chosen),
        "same_order": same / len(chosen),
    }


def gemm_rate(options: argparse.Namespace) -> float:
    """GFLOP/s of torch's bf16 product alone, at this width."""
    device = options.device
    generator = torch.Generator(device).manual_seed(0)
    problem = Problem(
        torch.randn(2048, options.dim, generator=generator, device=device),
        torch.randn(GEMM_ROWS, options.dim, generator=generator, device=device),
        options.k,
        options.threads,
    )
    run = product_alone(problem, torch.bfloat16, GEMM_ROWS)
    (timing,) = compare([Rival("product", run)], repetitions=7, device=device)
    return 2e-9 * 2048 * GEMM_ROWS * options.dim / timing.quantile(0.5)


def rivals(options: argparse.Namespace, folder: EmbeddingFolder) -> list[Rival]:
    """The same problem, smaller: ours takes fp16 parts as they lie on the disk."""
    images = folder.parts("img")[0][: options.rival_images]
    parts = MatrixParts(folder.parts("text")).pieces(0, options.rival_captions)
    queries, bank = (
        torch.from_numpy(rows).to(options.device)
        for rows in (np.array(images), np.concatenate(parts))
    )
    problem = Problem(queries, bank, options.k, options.threads)

    def ours() -> Any:
        return topk(queries, parts, options.k, options.threshold, threads=options.threads)

    wanted = ours()[0].cpu()

    def recall(result: tuple[Any, Any]) -> float:
        ids, scores = (torch.as_tensor(part).cpu() for part in result)
        ids = torch.where(scores >= options.threshold, ids, -1)
        due = wanted >= 0
        hit = torch.stack([torch.isin(own, got) for own, got in zip(wanted, ids, strict=True)])
        return float(hit[due].double().mean()) if due.any() else float("nan")

    found = [Rival("pymcip topk over parts", ours, recall)]
    for contender in CONTENDERS:
        if contender.device == options.device and contender.name.startswith(RIVALS):
            with contextlib.suppress(MissingRivalError):
                found.append(Rival(contender.name, contender.make(problem), recall))
    return found


# --------------------------------------------------------------------------------------------------


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common_arguments(__doc__)
    parser.add_argument("--work", type=Path, help="folder for the data; default: a temporary one")
    parser.add_argument("--keep", action="store_true", help="leave the embeddings in --work")
    parser.add_argument("--smoke", action="store_true", help=f"small: {SMOKE}")
    for name, value in FULL.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, help=f"default: {value}")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--threshold", type=float, default=0.27)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-limit", type=float, help="GiB of data (RLIMIT_DATA) of the miner")
    parser.add_argument("--kill-at", type=float, default=0.5, help="share of the blocks; 0: never")
    parser.add_argument("--checked", type=int, default=32, help="images ranked in fp64")
    parser.add_argument("--rival-images", type=int, default=2048)
    parser.add_argument("--rival-captions", type=int, default=200_000)
    parser.add_argument("--note", default="", help="what else ran on the machine; goes into rows")
    options = parser.parse_args(words)
    device = search_device(options.backend, "float16").type  # pymcip mine has no choice of it
    if options.device != device:
        print(f"pymcip mine works on {device} here, with backend={options.backend}")
        options.device = device
    for name, value in (SMOKE if options.smoke else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


@contextlib.contextmanager
def place(options: argparse.Namespace) -> Iterator[Path]:
    """Where the data go, with enough room for them."""
    rows = options.images + options.captions
    needed = rows * (2 * options.dim + 100)
    work = options.work or Path(tempfile.mkdtemp(prefix="bench_mining_"))
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free
    here = sum(file.stat().st_size for file in work.glob("embedded/*/*"))
    if free < 1.1 * needed - here:
        raise SystemExit(f"{work} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed")
    try:
        yield work
    finally:
        shutil.rmtree(work / "mined", ignore_errors=True)
        if not options.keep:
            shutil.rmtree(work / "embedded", ignore_errors=True)
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)


def main(words: Sequence[str] | None = None) -> None:
    options = arguments(words)
    with torch_threads(options.threads):
        _run(options)


def _run(options: argparse.Namespace) -> None:
    report = Report(
        "mining",
        device=options.device,
        dtype="float16",
        packages=("faiss-cpu", "faiss-gpu"),
        store=options.store,
    )
    case = {
        "N": options.images,
        "M": options.captions,
        "D": options.dim,
        "k": options.k,
        "threshold": options.threshold,
    }
    with place(options) as work:
        seconds = generate(work / "embedded", options)
        print(f"embeddings generated or found in {seconds:.1f} s")
        figures = full_case(options, work, case)
        report.record({"case": case, "rival": "pymcip mine", **figures})
        smaller = case | {"N": options.rival_images, "M": options.rival_captions}
        work_done = 2e-9 * smaller["N"] * smaller["M"] * options.dim
        timings = compare(
            rivals(options, EmbeddingFolder(work / "embedded")),
            repetitions=options.repetitions,
            device=options.device,
        )
    larger = case["N"] * case["M"] / (smaller["N"] * smaller["M"])
    report.add(
        smaller,
        timings,
        work=work_done,
        unit="GFLOP",
        accuracy="recall",
        notes={"note": options.note, "times_smaller_than_whole": larger},
    )
    for row in report.rows[1:]:
        print(f"{row['rival']}: {row['seconds']['p50'] * larger:.0f} s for the whole, computed")
    summary = {"bench": "mining", "case": case, **figures}
    summary["rivals"] = {
        row["rival"]: {
            "computed": row["seconds"]["p50"] * larger,
            "recall": row["accuracy"].get("recall"),
        }
        for row in report.rows[1:]
    }
    report.finish(summary=summary)


def full_case(options: argparse.Namespace, work: Path, case: dict[str, Any]) -> dict[str, Any]:
    out = work / "mined"
    shutil.rmtree(out, ignore_errors=True)
    before = gemm_rate(options)
    runs = [mine(options, work / "embedded", out, options.kill_at or None)]
    if runs[0].killed:
        print(f"killed after {runs[0].seconds:.1f} s, {runs[0].since_block:.1f} s into a block")
        runs.append(mine(options, work / "embedded", out, None))
    again = mine(options, work / "embedded", out, None)  # opens what is there
    after = gemm_rate(options)
    whole = sum(run.seconds for run in runs)
    lost = sum(run.since_block for run in runs) + (again.seconds if runs[0].killed else 0.0)
    flop = 2e-9 * options.images * options.captions * options.dim
    rate = flop / (whole - lost)
    ceiling = (before + after) / 2
    table = CaptionTable.load(out)
    figures = {
        "note": options.note,
        "seconds": whole,
        "seconds_lost_by_the_kill": lost,
        "seconds_without_the_kill": {"computed": whole - lost},
        "cpu_seconds": sum(run.cpu_seconds for run in runs),
        "killed": runs[0].killed,
        "pairs_per_second": options.images * options.captions / (whole - lost),
        "rate": rate,
        "unit": "GFLOP/s",
        "gemm_bf16_rate": {"before": before, "after": after},
        "times_gemm_bf16": rate / ceiling,
        "block_rows": json.loads((out / "mine.json").read_text())["block_rows"],
        "memory_limit_gib": options.memory_limit,
        "peak_bytes": {
            "without_page_cache": max(run.peak.get("RssAnon", 0) for run in runs),
            "resident": max(run.peak.get("VmHWM", 0) for run in runs),
            "mapped_files": max(run.peak.get("RssFile", 0) for run in runs),
        },
        "pairs": len(table.ids),
        "fp64": fp64_recall(options, EmbeddingFolder(work / "embedded"), table),
        "threads": options.threads,
    }
    print(json.dumps(case))
    for name, value in figures.items():
        print(f"  {name}: {value}")
    return figures


if __name__ == "__main__":
    main()
