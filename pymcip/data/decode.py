"""Which files are images, and from the bytes of one to an RGB image and to a box of it."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import mimetypes
import os
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from pymcip.errors import DecodeError

with contextlib.suppress(ImportError):  # reads .heic and .heif where it is installed
    import pillow_heif

    pillow_heif.register_heif_opener()

# Formats that Pillow opens without reading pixels, and EPS, which is a program that it would run.
_NO_PIXELS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}
# What cameras write: Pillow takes some of them for a TIFF, and gives the thumbnail in it.
_RAW = {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw"}

REDUCED_FROM = "reduced from"

_log = logging.getLogger("pymcip.data")
said: set[str] = set()  # what this process has warned of once


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the extensions, such as ".jpg", of the image formats that Pillow reads here."""
    return frozenset(
        extension
        for extension, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _NO_PIXELS
    )


def looks_like_image(path: str | os.PathLike[str]) -> bool:
    """Return whether a file's first bytes are those of an image that Pillow reads."""
    try:
        with Image.open(path) as image:
            return image.format not in _NO_PIXELS
    except Exception:  # Pillow's decoders raise errors of many types
        return False


@functools.lru_cache(maxsize=10_000)
def kind_of_suffix(suffix: str) -> Literal["image", "other image", "other", "unknown"]:
    """Say what a lower-case extension promises: an image, one that can't be read, no image."""
    if suffix in image_suffixes():
        return "image"
    if suffix in _RAW or suffix == ".svg":
        return "other image"
    kind = mimetypes.guess_type(f"x{suffix}")[0] or ""
    if kind.startswith(("image/", "video/")):
        return "unknown"  # the name may be wrong: the content decides
    return "other" if kind or suffix in _SIDECARS else "unknown"


_SIDECARS = {
    ".cls", ".db", ".ini", ".jsonl", ".lock", ".log", ".md", ".npy", ".npz", ".parquet", ".pkl",
    ".toml", ".tsv", ".yaml", ".yml",
}  # fmt: skip


def decode(content: bytes, key: str, least: int | None = None) -> Image.Image:
    """Decode an image file to RGB, as open_clip's loaders do.

    The first frame is taken, an alpha channel is dropped, the EXIF orientation is left as it is;
    16-bit grey is scaled by the range of its format, whatever values it holds (a PNG's chunk sBIT or a
    TIFF's bits per sample may say that it is smaller), and float grey from 0 to 1 (Pillow alone would
    clip both).

    Args:
        content: the file's bytes.
        key: what errors call it.
        least: a JPEG may come at a half, a quarter or an eighth of its size, if its shorter side
            keeps so many pixels: its decoder leaves the finer detail out, which is faster. The image's
            `info` says by `REDUCED_FROM` its whole width and height, and what these have become.

    Raises:
        DecodeError: it is cut short, no image, of 32-bit integers or of floats beyond 0 to 1, which
            have no range to scale by, or has more than `PIL.Image.MAX_IMAGE_PIXELS`
            pixels (a decompression bomb; Pillow itself only warns up to twice as many).
    """
    try:
        image = Image.open(io.BytesIO(content))
        pixels = image.width * image.height
        if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{pixels} pixels")
        if least is not None:
            whole = image.size
            found = image.draft(None, (least, least))  # type: ignore[arg-type]  # the mode stays
            if found is not None and image.size != whole:
                image.info[REDUCED_FROM] = (*whole, *found[1][2:])
        image.load()
        return to_rgb(image, key, significant_bits(content))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(
            f"{key}: more than {Image.MAX_IMAGE_PIXELS} pixels ({error}), as a decompression bomb "
            "has; raise PIL.Image.MAX_IMAGE_PIXELS if the image is to be trusted"
        ) from error
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):
            what = "not an image, or of a kind that Pillow does not read"
        raise DecodeError(f"{key} can't be decoded ({len(content)} bytes): {what}") from error


def thumbnail(image: Image.Image, side: int, quality: int = 85) -> bytes:
    """Make a JPEG of an RGB image, upright and at most `side` pixels wide and high."""
    small = ImageOps.exif_transpose(image)
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def crop(image: Image.Image, box: npt.NDArray[np.float32], key: str) -> Image.Image:
    """Cut an image to a box, as `ImageData.cropped` takes it.

    Raises:
        DecodeError: the image is too small for it.
    """
    left, top, right, bottom = (float(edge) for edge in box)
    right += image.width if right <= 0 else 0
    bottom += image.height if bottom <= 0 else 0
    if round(right) <= round(left) or round(bottom) <= round(top):
        raise DecodeError(
            f"{key} is {image.width} x {image.height}: too small for the crop {box.tolist()}"
        )
    return image.crop((left, top, right, bottom))  # type: ignore[arg-type]  # it rounds


def significant_bits(content: bytes) -> int | None:
    """How many bits of its grey a PNG says are significant (chunk sBIT); None if it says nothing."""
    place = 8
    while content.startswith(b"\x89PNG") and place + 8 < len(content):
        kind = content[place + 4 : place + 8]
        if kind in (b"sBIT", b"IDAT"):
            return content[place + 8] if kind == b"sBIT" else None
        place += 12 + int.from_bytes(content[place : place + 4], "big")
    return None


def to_rgb(
    image: Image.Image, key: str = "the picture", significant: int | None = None
) -> Image.Image:
    """Convert an image as `decode` does.

    Args:
        image: in any mode.
        key: its name for messages.
        significant: see `significant_bits`.

    Raises:
        ValueError: its pixels have no range to scale by.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(image, key, significant))
    elif image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _eight_bits(image: Image.Image, key: str, significant: int | None) -> npt.NDArray[np.uint8]:
    """Scale grey of more than 8 bits: uint8 [H, W]."""
    values = np.asarray(image)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError("its float pixels are not all from 0 to 1; write it with 8 or 16 bits")
        return np.round(255 * values).astype(np.uint8)
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # of those Pillow means 16 bits
        raise ValueError("32-bit integers have no range to scale by; write it with 8 or 16 bits")
    bits = 16
    if image.format == "TIFF":
        bits = int(getattr(image, "tag_v2", {}).get(258, (16,))[0])  # BitsPerSample
    brightest = int(values.max(initial=0))
    if significant is not None and 8 <= significant < bits and brightest < 1 << significant:
        # By PNG's rules the values of fewer bits are scaled to 16: multiples of 2^(16 - bits), or one
        # more. Where they are not, the writer has stored them as they were.
        as_they_were = (values % (1 << (bits - significant)) > 1).any()
        bits = significant if as_they_were else bits
    if 0 < brightest < 1 << (bits - 3) and "dark" not in said:
        said.add("dark")
        _log.warning(
            "%s is a picture of %d bits that uses the values up to %d only and comes out dark; if a "
            "camera of fewer bits made it, write its values times %d (said once)",
            key, bits, brightest, 1 << (bits - brightest.bit_length()),
        )  # fmt: skip
    return (values.astype(np.int64) >> (bits - 8)).clip(0, 255).astype(np.uint8)
