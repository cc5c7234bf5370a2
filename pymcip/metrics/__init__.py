"""Retrieval, k-NN and zero-shot metrics: pure functions of arrays, all in percent.

Common to all of them: embeddings [N, D] of any real type are L2-normalised to fp32, and rankings
order by (score descending, index ascending), the score being the inner product in fp64 rounded to
fp32 (`pymcip.ops.canonical`). The first of a ranking come from `pymcip.ops.topk`, the places of
relevant rows in a full one from `pymcip.ops.ranks`; both are the same on every device, with any
number of threads. No ranking is ever whole in memory, which stays bounded (a few hundred MB). NumPy
arrays and tensors are taken; tensors are worked on where they are.
"""

from pymcip.metrics.neighbours import (
    KNN_TEMPERATURE,
    knn_classify,
    nearest_other_recall,
    recall_at_k,
)
from pymcip.metrics.rankings import (
    REVISITED,
    full_ranking_ap,
    full_ranking_map,
    revisited_map,
    revisited_retrieval,
    trapezoidal_map,
    trapezoidal_retrieval,
)
from pymcip.metrics.text import (
    class_text_map,
    cross_modal_recall,
    expand_prompts,
    prompt_ensemble,
    zero_shot_accuracy,
    zero_shot_classifier,
)

__all__ = [
    "KNN_TEMPERATURE",
    "REVISITED",
    "class_text_map",
    "cross_modal_recall",
    "expand_prompts",
    "full_ranking_ap",
    "full_ranking_map",
    "knn_classify",
    "nearest_other_recall",
    "prompt_ensemble",
    "recall_at_k",
    "revisited_map",
    "revisited_retrieval",
    "trapezoidal_map",
    "trapezoidal_retrieval",
    "zero_shot_accuracy",
    "zero_shot_classifier",
]
