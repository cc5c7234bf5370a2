"""Time reading images, one process: JPEG files in a tar shard to the model's input.

Rivals: open_clip's own pipeline (webdataset, Pillow, the model's transform) and pymcip's, without and
with `reduced_decoding`; both of these for training, too, with open_clip's random crops. The bound is
libjpeg-turbo, by Pillow, with nothing after it. The accuracy is the difference from the pixels of `pymcip`,
0 to 255, and with --model the cosine between the embeddings.

    python bench/bench_data.py --model local-dir:/path --images photographs/ --store
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from harness import Report, Rival, compare
from PIL import Image
from torch import Tensor

from pymcip.data import ImageData, load_images
from pymcip.data.loading import iterate_batches
from pymcip.embedding.write import REDUCED
from pymcip.model import ClipModel, load
from pymcip.training.batches import AugmentedImages, reduced_transform

SIZE = 224  # of the model's input, without --model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 1200])
    parser.add_argument("--count", type=int, default=16, help="images of each size")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--images", help="photographs to scale; default: generated pictures")
    parser.add_argument("--model", help="whose transform and embeddings are taken")
    parser.add_argument("--store", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    clip = None if options.model is None else load(options.model, device="cpu", precision="fp32")
    transform: Any = (
        open_clip.image_transform(SIZE, is_train=False) if clip is None else clip.preprocess_val
    )
    size = SIZE if clip is None else clip.preprocess_val.transforms[0].size  # type: ignore[attr-defined]
    crops: Any = open_clip.image_transform(size, is_train=True)
    fewer, least = reduced_transform(crops)
    report = Report(
        "data", device="cpu", dtype="uint8", packages=("webdataset", "pillow"), store=options.store
    )
    for side in options.sides:
        with tempfile.TemporaryDirectory() as folder:
            shard = Path(folder) / "00000.tar"
            bytes_each = write_shard(shard, options.images, options.count, side)
            data = load_images(shard, labelled=False)
            exact = own(data, transform)
            check = partial(accuracy, exact=exact, clip=clip)
            check_crops = partial(accuracy, exact=augmented(data, crops), clip=clip)
            rivals = [
                Rival("open_clip", partial(open_clips, shard, transform), check),
                Rival("pymcip", partial(own, data, transform), check),
                Rival(
                    "pymcip reduced", partial(own, data.reduced(REDUCED * size), transform), check
                ),
                Rival("pymcip train", partial(augmented, data, crops), check_crops),
                Rival(
                    "pymcip train reduced",
                    partial(augmented, data.reduced(least), fewer),
                    check_crops,
                ),
                Rival("libjpeg-turbo", partial(decode_alone, data)),
            ]
            report.add(
                {"side": side, "input": size, "bytes": bytes_each},
                compare(rivals, repetitions=options.repetitions, tolerant=True),
                work=options.count, unit="images", accuracy="pixels", ceiling="libjpeg-turbo",
            )  # fmt: skip
    report.finish()


def pictures(source: str | None, count: int, side: int) -> Iterator[Image.Image]:
    """Yield pictures whose shorter side is `side`: photographs, or noise with a falling spectrum."""
    data = None if source is None else load_images(source, labelled=False)
    for number in range(count):
        if data is not None:
            image = data.read(number * len(data) // count)
            scale = side / min(image.size)
            width, height = (max(side, round(scale * edge)) for edge in image.size)
            yield image.resize((width, height), Image.Resampling.BICUBIC)
            continue
        generator = np.random.default_rng(number)
        shape = (side, 4 * side // 3)
        rows, columns = (np.fft.fftfreq(edge)[:, None] for edge in shape)
        falling = np.maximum(np.hypot(rows, columns.T), 1 / side) ** -1.5
        grey, *colours = np.fft.ifft2(
            np.fft.fft2(generator.normal(size=(4, *shape))) * falling
        ).real
        values = np.stack([grey + 0.3 * colour for colour in colours])
        values = 128 + 50 * values / values.std()
        yield Image.fromarray(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def write_shard(path: Path, source: str | None, count: int, side: int) -> int:
    """Write the pictures as JPEGs of quality 90 into a shard; returns the mean of their bytes."""
    total = 0
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(pictures(source, count, side)):
            content = io.BytesIO()
            image.save(content, "JPEG", quality=90)
            member = tarfile.TarInfo(f"{number:06}.jpg")
            member.size = content.tell()
            total += member.size
            content.seek(0)
            tar.addfile(member, content)
    return total // count


def open_clips(shard: Path, transform: Any) -> Tensor:
    """Read the images as open_clip's training script reads a validation set, in this process."""
    import webdataset

    found = webdataset.WebDataset(str(shard), shardshuffle=False).decode("pilrgb")
    steps = found.rename(image="jpg").map_dict(image=transform).to_tuple("image")
    return torch.stack([image for (image,) in steps])


def own(data: ImageData, transform: Any) -> Tensor:
    (batch,) = iterate_batches(data, np.arange(len(data)), transform, batch_size=len(data))
    return batch.images


def augmented(data: ImageData, transform: Any) -> Tensor:
    images = AugmentedImages(data, transform, seed=0)
    return torch.stack([images[0, row, row][0] for row in range(len(data))])


def decode_alone(data: ImageData) -> None:
    for row in range(len(data)):
        Image.open(io.BytesIO(data.stores[0].read(row))).load()


def accuracy(found: Tensor, exact: Tensor, clip: ClipModel | None) -> dict[str, float]:
    """Mean and highest difference of pixels; the lowest cosine of an embedding, with a model."""
    deviation = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
    difference = 255 * deviation * (found - exact).abs()
    figures = {"pixels": float(difference.mean()), "highest": float(difference.max())}
    if clip is not None:
        one, other = (clip.encode_images(images) for images in (found, exact))
        figures["cosine"] = float((one * other).sum(dim=1).min())
    return figures


if __name__ == "__main__":
    main()
