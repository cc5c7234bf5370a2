"""From the bytes of an image file to an RGB image, and to a box of it."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pymcip.errors import DecodeError


def decode(content: bytes, key: str) -> Image.Image:
    """Decode an image file to RGB, as open_clip's loaders do.

    The first frame is taken, an alpha channel is dropped, the EXIF orientation is left as it is;
    16-bit grey is scaled to 8 bits (Pillow alone would clip it).

    Raises:
        DecodeError: it is cut short, no image, or has more than `PIL.Image.MAX_IMAGE_PIXELS`
            pixels (a decompression bomb; Pillow itself only warns up to twice as many).
    """
    try:
        image = Image.open(io.BytesIO(content))
        pixels = image.width * image.height
        if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{pixels} pixels")
        image.load()
        return _to_rgb(image)
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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits, in one of Pillow's several modes for them
        values = np.asarray(image).astype(np.int64)
        if values.max(initial=0) > 255:
            values >>= 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    elif image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
