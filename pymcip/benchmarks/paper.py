"""What others report, in percent, to compare with: Table 1 of arXiv 2409.01936, and open_clip's tables."""

from __future__ import annotations

BENCHMARKS = (
    "gpr1200", "instre", "cub200", "roxford5k",
    "knn-imagenet1k", "knn-imagenet-sketch", "knn-imagenet-a", "knn-fgvc-aircraft",
    "zeroshot-imagenet1k", "zeroshot-imagenet-sketch", "zeroshot-imagenet-a", "zeroshot-objectnet",
    "t2i-flickr30k", "t2i-coco",
)  # fmt: skip

TABLE: dict[str, tuple[float, ...]] = {
    "OpenAI L/14-336": (
        76.0, 77.5, 77.0, 43.4, 78.2, 52.7, 46.4, 51.3, 76.6, 61.0, 77.6, 72.0, 89.0, 61.7,
    ),
    "OpenAI L/14-336 + GPR-FT": (
        87.1, 85.0, 88.2, 67.3, 84.2, 60.5, 61.2, 57.8, 74.5, 60.8, 76.2, 74.5, 84.9, 57.2,
    ),
    "OpenAI L/14-336 + GPR-FT + Re-A": (
        86.7, 84.4, 87.9, 66.4, 83.8, 60.4, 60.9, 57.1, 77.2, 61.5, 77.9, 74.6, 89.8, 64.6,
    ),
    "OpenAI L/14-336 + MCIP": (
        87.0, 84.8, 88.0, 67.4, 84.1, 60.4, 61.0, 57.7, 77.0, 61.1, 78.3, 74.5, 90.1, 65.6,
    ),
    "OpenAI L/14-336 + MCIP + Re-A": (
        87.0, 84.8, 88.0, 67.4, 84.1, 60.4, 61.0, 57.7, 77.3, 61.6, 78.4, 74.6, 90.2, 66.1,
    ),
    "LAION (DataComp) L/14": (
        77.2, 80.2, 82.2, 50.8, 79.5, 61.0, 43.8, 59.3, 79.2, 68.0, 69.6, 74.3, 91.6, 70.3,
    ),
    "LAION (DataComp) L/14 + MCIP + Re-A": (
        87.5, 82.1, 90.2, 72.3, 83.8, 65.8, 61.5, 63.1, 80.2, 68.2, 75.2, 79.7, 91.7, 69.8,
    ),
    "SigLIP SO400M-384": (
        78.2, 84.1, 82.4, 51.3, 85.2, 67.1, 59.7, 71.8, 83.1, 74.5, 82.5, 76.9, 93.5, 76.7,
    ),
    "SigLIP SO400M-384 + MCIP + Re-A": (
        89.0, 85.1, 91.2, 70.5, 86.4, 70.2, 68.7, 72.3, 82.9, 74.7, 84.4, 80.3, 95.0, 75.3,
    ),
}  # fmt: skip

# open_clip's docs/openclip_results.csv and openclip_retrieval_results.csv (R@5), of the same models.
OPEN_CLIP_BENCHMARKS = (
    "zeroshot-imagenet1k", "zeroshot-imagenet-sketch", "zeroshot-imagenet-a", "zeroshot-objectnet",
    "t2i-flickr30k", "t2i-coco",
)  # fmt: skip
OPEN_CLIP: dict[str, tuple[float, ...]] = {
    "OpenAI L/14-336": (76.56, 61.00, 77.48, 71.83, 89.00, 61.62),
    "LAION (DataComp) L/14": (79.21, 67.95, 69.59, 74.25, 91.74, 70.03),
    "SigLIP SO400M-384": (83.08, 74.54, 82.47, 76.95, 96.10, 76.78),
}

# The paper's base models as open_clip names them.
MODELS = {
    ("ViT-L-14-336", "openai"): "OpenAI L/14-336",
    ("ViT-L-14-336-quickgelu", "openai"): "OpenAI L/14-336",
    ("ViT-L-14", "datacomp_xl_s13b_b90k"): "LAION (DataComp) L/14",
    ("ViT-SO400M-14-SigLIP-384", "webli"): "SigLIP SO400M-384",
}


def reported(model: str, pretrained: str | None) -> dict[str, float]:
    """Return the paper's figures of one of its base models, by benchmark; else none."""
    row = MODELS.get((model, pretrained or ""))
    return {} if row is None else dict(zip(BENCHMARKS, TABLE[row], strict=True))


def published_by_open_clip(model: str, pretrained: str | None) -> dict[str, float]:
    """Return open_clip's own figures of one of these models, by benchmark; else none."""
    row = MODELS.get((model, pretrained or ""))
    return {} if row is None else dict(zip(OPEN_CLIP_BENCHMARKS, OPEN_CLIP[row], strict=True))
