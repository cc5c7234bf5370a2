"""The losses of the MCIP method as modules. The arithmetic is in `pymcip.ops.margin_softmax`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from pymcip.ops.margin_softmax import MarginOptions, Shard, margin_softmax


class ArcMargin(nn.Module):
    """ArcFace (arXiv 1801.07698) over a trainable class matrix `weight` [C, D], fp32.

        L = -log( e^{s cos(t_y + m)} / ( e^{s cos(t_y + m)} + sum over j != y of e^{s cos t_j} ) )

    The loss runs over the whole class matrix without a B x C matrix in fp32. `options` are the
    fields of `pymcip.ops.margin_softmax.MarginOptions`: scale, continuation, compute, scratch, …
    With a `shard` of several processes, `weight` holds its `num_classes` rows of the whole matrix.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        margin: float = 0.3,
        backend: str = "auto",
        shard: Shard | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.options, self.backend = MarginOptions(margin=margin, **options), backend
        self.shard = shard
        self.weight = nn.Parameter(torch.empty(num_classes, dim).normal_(std=dim**-0.5))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Per-image losses [B], fp32, of embeddings x [B, D] (any norm) with labels int64 [B]."""
        return margin_softmax(
            x,
            self.weight,
            torch.arange(len(labels) + 1, device=labels.device),
            labels,
            shard=self.shard,
            backend=self.backend,
            **asdict(self.options),
        )


class MCArcMargin(nn.Module):
    """ArcMargin with several positives per image, over a frozen bank of caption rows [M, D].

    With an image's positives P (its pseudo-captions) and all other rows as negatives:

        Z = sum over j not in P of e^{s cos t_j}
        L = (1/|P|) sum over p in P of softplus(log Z - s cos(t_p + m))

    An image's own positives never act as negatives for each other. The MCIP paper (arXiv 2409.01936)
    names this loss; its text was not at hand when this was written, so this closed form is the
    project's. With `positives="compete"` it is the form of the authors' scripts: a softmax over the
    columns in which an image's own positives stay, each with its margin,

        L = (1/|P|) sum over p in P of ( log(Z + sum over q in P of e^{s cos(t_q + m)}) - s cos(t_p + m) )

    For |P| = 1 both are ArcMargin. `repel` (0.1 in their scripts) adds to it as many times -log of the
    share that the softmax gives to the farthest row that isn't the image's. `options` are the fields of
    `MarginOptions`: scale, margin, continuation, positives, repel, compute, delta, … On a GPU a bank in
    half precision is used as it is.
    With a `shard` of several processes, `bank` holds its rows of the whole one.
    """

    bank: Tensor
    norms: Tensor

    def __init__(
        self, bank: Tensor, *, backend: str = "auto", shard: Shard | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.register_buffer("bank", bank, persistent=False)
        norms = torch.cat([part.float().norm(dim=1) for part in bank.split(65_536)])
        self.register_buffer("norms", norms, persistent=False)
        self.options, self.backend, self.shard = MarginOptions(**options), backend, shard

    def forward(
        self,
        x: Tensor,
        indptr: Tensor,
        indices: Tensor,
        weights: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Per-image losses [B], fp32; 0 for an image without pseudo-captions.

        x: [B, D], any norm. indptr: int64 [B + 1] and indices: int64 [nnz], the positives in CSR form.
        weights: [nnz], for example from the captions' cosines; default 1/|P|. columns: int64 [K] in
        rising order, the rows of the bank that take part, all positives among them; default: all.
        """
        bank, norms, shard = self.bank, self.norms, self.shard
        if columns is not None:
            indices = torch.searchsorted(columns, indices)
            if shard is not None:  # those of `columns` that this process has
                ends = torch.tensor([shard.first, shard.first + len(bank)], device=columns.device)
                first, last = torch.searchsorted(columns, ends).tolist()
                columns = columns[first:last] - shard.first
                shard = replace(shard, first=first)
            bank, norms = bank[columns], norms[columns]
        return margin_softmax(
            x,
            bank,
            indptr,
            indices,
            weights=weights,
            w_norms=norms,
            shard=shard,
            backend=self.backend,
            **asdict(self.options),
        )


def info_nce(
    images: Tensor,
    texts: Tensor,
    scale: float | Tensor,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
) -> Tensor:
    """InfoNCE in both directions (CLIP, arXiv 2103.00020) over unit embeddings [B, D] -> scalar.

    Row i of `images` belongs to row i of `texts`. `scale` is CLIP's exp(logit_scale). Pairs i != j of
    the same image or the same caption (equal `image_ids` or `text_ids`, int64 [B]) are not negatives.
    """
    logits = scale * (images.float() @ texts.float().T)
    same = torch.zeros_like(logits, dtype=torch.bool)
    for ids in (image_ids, text_ids):
        if ids is not None:
            same |= ids[:, None] == ids[None, :]
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    loss = nn.functional.cross_entropy
    return 0.5 * (loss(logits, target) + loss(logits.T, target))
