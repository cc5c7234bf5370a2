"""Images per second of pymcip's training loop against open_clip's own.

Same open_clip model, JPEG files, augmentation, batch size, precision, optimizer and number of
decoding processes; the loops take turns, a run is one epoch. pymcip's loop trains the image tower
with ArcMargin and MCArcMargin (method mcip). open_clip's loop is `open_clip_train.train_one_epoch`
with its contrastive loss, once as it is (both towers) and once with the text tower locked
(`--lock-text`), which is the nearest to what mcip trains; it still runs the text tower forward.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import torch
from harness import Report, Rival, common_arguments, compare
from open_clip_train.data import CsvDataset, DataInfo
from open_clip_train.train import train_one_epoch
from PIL import Image
from torch.utils.data import DataLoader

from pymcip.configs import TrainConfig
from pymcip.data import load_images
from pymcip.mining import CaptionTable
from pymcip.model import ClipModel, load
from pymcip.training.batches import train_transform
from pymcip.training.checkpoints import Position
from pymcip.training.image_stage import ImageStage, caption_bank
from pymcip.training.logs import MetricsLog
from pymcip.training.loop import Interruption, Run, run_epoch
from pymcip.training.optim import make_optimizer, parameter_groups
from pymcip.training.settings import fit_settings

CLASSES, CAPTIONS, PER_IMAGE = 1000, 20_000, 10


def write_images(folder: Path, count: int, size: int = 256) -> Path:
    """JPEG photographs' stand-ins (smooth noise) and a table that both loops read."""
    generator = np.random.default_rng(0)
    lines = ["filepath\tlabel\ttitle"]
    for i in range(count):
        coarse = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size)).save(folder / f"{i}.jpg", quality=90)
        lines.append(f"{folder / f'{i}.jpg'}\t{i % min(CLASSES, count // 2)}\ta photo of thing {i}")
    table = folder / "images.tsv"
    table.write_text("\n".join(lines) + "\n")
    return table


def our_loop(table: Path, folder: Path, options: Any) -> Callable[[], float]:
    clip = model_of(options)
    open_config = TrainConfig(
        model=options.model, train_data=str(table), method="mcip", captions="-", out=folder, epochs=10**6,
        batch_size=options.batch_size, workers=options.workers, precision=options.precision,
        save_steps=10**9, log_steps=10**9, warmup=0,
    )  # fmt: skip
    data = load_images(open_config.train_data)
    config, _ = fit_settings(open_config, clip, data)
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((CAPTIONS, clip.embed_dim)).astype(np.float16)
    n = len(data) * PER_IMAGE
    caption_table = CaptionTable(
        indptr=np.arange(0, n + 1, PER_IMAGE),
        ids=generator.permutation(np.arange(n) % CAPTIONS),
        cosines=np.ones(n, dtype=np.float32),
        num_captions=CAPTIONS,
    )
    bank, positives = caption_bank(caption_table, vectors, "bank", 0)
    stage = ImageStage(clip, data, config, class_rows=None, bank=bank, positives=positives)
    log = MetricsLog(folder, (), {})
    run = Run(clip, config, folder, log, Interruption(), Position(), lambda run, stage: None)

    def epoch() -> float:
        run.position.step = 0
        run_epoch(run, stage)
        run.position.epoch += 1
        return run.position.skipped_steps

    return epoch


def open_clips_loop(table: Path, options: Any, lock_text: bool) -> Callable[[], float]:
    clip = model_of(options)
    model = clip.model
    model.output_dict = True  # type: ignore[assignment]
    if lock_text:
        model.lock_text_tower()  # type: ignore[operator]
    dataset = CsvDataset(
        str(table),
        train_transform(clip, clip.image_size, {}),
        "filepath",
        "title",
        "\t",
        tokenizer=clip.tokenizer,
    )
    loader = DataLoader(
        dataset, options.batch_size, shuffle=True, num_workers=options.workers, drop_last=True,
        pin_memory=options.device == "cuda",
    )  # fmt: skip
    loader.num_samples, loader.num_batches = len(dataset), len(loader)  # type: ignore[attr-defined]
    config = TrainConfig(model=options.model, train_data="-", out="-")
    optimizer = make_optimizer(
        parameter_groups(model.named_parameters(), lr=1e-5, wd=config.wd), config
    )
    arguments = SimpleNamespace(
        device=options.device, precision=options.precision, distill=False, accum_freq=1,
        skip_scheduler=True, grad_clip_norm=1.0, horovod=False, rank=0, local_rank=0,
        distributed=False, world_size=1, batch_size=options.batch_size, wandb=False,
        log_every_n_steps=10**9,
    )  # fmt: skip
    loss = open_clip.ClipLoss()
    data = {"train": DataInfo(loader)}

    def epoch() -> float:
        train_one_epoch(model, data, loss, 0, optimizer, None, None, None, arguments)
        return 0.0

    return epoch


def model_of(options: Any) -> ClipModel:
    torch.manual_seed(0)
    return load(options.model, "random", device=options.device, precision=options.precision)


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=None, help="default: 32, on a GPU 256")
    parser.add_argument("--precision", choices=["amp_bf16", "fp32"], default="amp_bf16")
    parser.add_argument("--workers", type=int, default=None, help="default: 0, on a GPU 12")
    parser.add_argument("--steps", type=int, default=8, help="steps per run")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.batch_size = options.batch_size or (256 if on_gpu else 32)
    options.workers = (12 if on_gpu else 0) if options.workers is None else options.workers
    images = options.batch_size * options.steps
    with tempfile.TemporaryDirectory() as folder:
        table = write_images(Path(folder), images)
        rivals = [
            Rival("open_clip, text locked", open_clips_loop(table, options, True), float),
            Rival("open_clip, both towers", open_clips_loop(table, options, False), float),
            Rival("pymcip mcip", our_loop(table, Path(folder), options), float),
        ]
        report = Report(
            "train", device=options.device, dtype=options.precision, store=options.store
        )
        timings = compare(rivals, repetitions=options.repetitions, device=options.device)
    case = {"model": options.model, "batch": options.batch_size, "workers": options.workers}
    report.add(case, timings, work=images, unit="images", accuracy="skipped")
    report.finish()


if __name__ == "__main__":
    main()
