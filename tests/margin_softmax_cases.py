"""Problems for margin_softmax, and the ways that its back ends can take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pymcip.ops import margin_softmax
from pymcip.ops.margin_contract import CELL_COLUMNS, CELL_ROWS

KEEP, ANEW = 1 << 30, 1  # scratch: all of E, or one cell at a time


@dataclass(frozen=True)
class Case:
    rows: int
    columns: int
    dim: int
    scale: float = 30.0
    margin: float = 0.3
    positives: int = 1  # per row; -1: all columns
    clustered: bool = False
    duplicates: bool = False  # half of the columns repeat the other half
    pole: float = 0.0  # +-1: the first rows equal their positive, or its opposite
    equal: bool = False  # all rows and columns are the same

    @lru_cache(maxsize=2)  # noqa: B019  # one case after the other
    def make(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, w in fp32, and the positives in CSR form."""
        generator = torch.Generator(device).manual_seed(self.rows + 7 * self.columns + self.dim)
        count = self.columns if self.positives < 0 else min(self.positives, self.columns)
        w, x = (
            torch.randn(length, self.dim, generator=generator, device=device)
            for length in (self.columns, self.rows)
        )
        numbers = torch.arange(count, device=device)
        lengths = torch.full((self.rows,), count, device=device)
        if self.clustered:  # cells are clusters, and rows lie near some of them
            centres = torch.randn(
                -(-self.columns // CELL_COLUMNS), self.dim, generator=generator, device=device
            )
            w = 0.5 * w + centres.repeat_interleave(CELL_COLUMNS, 0)[: self.columns]
            near = torch.arange(self.rows, device=device) // CELL_ROWS % len(centres)
            x = 0.5 * x + centres[near]
            own = near[:, None] * CELL_COLUMNS + numbers
        else:
            if self.duplicates:
                w[self.columns // 2 : self.columns // 2 * 2] = w[: self.columns // 2]
            if self.equal:
                x[:], w[:] = x[:1].clone(), x[:1].clone()
            # Distinct within a row: an arithmetic sequence that does not come round.
            first, step = (
                torch.randint(most, (self.rows, 1), generator=generator, device=device)
                for most in (self.columns, self.columns // max(count, 1))
            )
            own = (first + (step + 1) * numbers) % self.columns
            if self.pole and count:
                x[::2] = self.pole * 3 * w[own[::2, 0]]
            if self.rows > 2 and count > 1:  # rows of different lengths, one of them empty
                lengths = 1 + torch.arange(self.rows, device=device) % count
                lengths[1] = 0
        indptr = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return x, w, indptr, own[numbers < lengths[:, None]]


@dataclass(frozen=True)
class Way:
    """How the op is asked; `half_bank`: W frozen, in 16 bits, its norms given."""

    compute: str
    need_w: bool = False
    scratch: int = KEEP
    half_bank: bool = False
    delta: float = 0.0

    def loss(
        self, backend: str, case: Case, x: Tensor, w: Tensor, indptr: Tensor, indices: Tensor
    ) -> Tensor:
        return margin_softmax(
            x,
            w.to(getattr(torch, self.compute)) if self.half_bank else w,
            indptr,
            indices,
            scale=case.scale,
            margin=case.margin,
            compute=self.compute,
            scratch=self.scratch,
            delta=self.delta,
            backend=backend,
            w_norms=w.norm(dim=1) if self.half_bank else None,
        )


# On a GPU: two widths, since each is compiled anew (tests/count_kernels.py). D = 72 ends within
# every tile; for 768 the kernels are made.
EDGES = (
    Case(1, 1, 72),
    Case(1, 2, 72, scale=64.0, margin=0.5),
    Case(7, 2, 72, positives=-1),
    Case(7, 1000, 72, positives=0),
    Case(5, 300, 72, positives=50),
    Case(7, 300, 72, duplicates=True, positives=5),
    Case(8, 300, 72, pole=1.0, margin=0.5),
    Case(8, 300, 72, pole=-1.0, margin=0.5),
    Case(8, 300, 72, equal=True, positives=5),
    Case(20, 300, 72, scale=110.0, positives=3),  # exp(s) is infinite in fp32
    Case(130, 600, 72, scale=64.0, margin=0.5),
    Case(300, 131_073, 72, positives=5),
)
WIDE = (
    Case(256, 1000, 768, scale=64.0, margin=0.5, positives=50),
    Case(4096, 65_537, 768, scale=64.0, margin=0.5, positives=50),
)
SMALL_SCRATCH = 1 << 26  # chunks of many cells
BF16 = (
    Way("bfloat16"),
    Way("bfloat16", half_bank=True),
    Way("bfloat16", need_w=True),
    Way("bfloat16", need_w=True, scratch=SMALL_SCRATCH),
    Way("bfloat16", need_w=True, delta=1e-30),  # the filter's way, but nothing is left out
)
FP16 = (
    Way("float16", half_bank=True),
    Way("float16", need_w=True, scratch=SMALL_SCRATCH),
)
# The slowest to change is the case: its reference is kept.
ON_GPU = [
    *((case, way) for case in EDGES for way in (*BF16, *FP16)),
    *((case, way) for case in WIDE for way in BF16),
]
