"""Images and captions on disk, as indices that know nothing about models."""

from pymcip.data.captions import Captions, load_captions
from pymcip.data.decode import decode
from pymcip.data.images import ImageData
from pymcip.data.index import list_images, load_images

__all__ = [
    "Captions",
    "ImageData",
    "decode",
    "list_images",
    "load_captions",
    "load_images",
]
