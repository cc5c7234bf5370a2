"""Embeddings of images and captions: folders of them on disk, how they are made, and a cache."""

from pymcip.embedding.cache import EmbeddingCache
from pymcip.embedding.folder import EmbeddingFolder, Kind, Matrix
from pymcip.embedding.write import embed, embed_captions, embed_images

__all__ = [
    "EmbeddingCache",
    "EmbeddingFolder",
    "Kind",
    "Matrix",
    "embed",
    "embed_captions",
    "embed_images",
]
