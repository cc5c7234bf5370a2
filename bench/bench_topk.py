"""Exact top-k: every back end of `pymcip.ops.topk` against faiss and a bare matrix product.

The data resemble captions: clusters of unit rows, queries near some of them. Recall is measured
against an fp64 ranking of the first queries.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import Report, Rival, common_arguments, compare

from pymcip.ops import backends, topk

CHECKED = 64  # queries whose ranking is compared with fp64's
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--queries", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    options = parser.parse_args()

    report = Report("topk", device=options.device, dtype=options.dtype)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(options.bank // 50 + 1, options.dim, generator=generator)
    bank = near(centres, options.bank, options, generator)
    for count in options.queries:
        queries = near(centres, count, options, generator)
        wanted, kth = fp64_ranking(queries, bank, options.k)
        for threshold in (None, kth):
            timings = compare(
                rivals(queries, bank, threshold, wanted, options),
                repetitions=options.repetitions,
                device=options.device,
            )
            report.add(
                {
                    "N": count,
                    "M": options.bank,
                    "D": options.dim,
                    "k": options.k,
                    "threshold": threshold and round(threshold, 4),
                },
                timings,
                work=2e-9 * count * options.bank * options.dim,
                unit="GFLOP",
                accuracy=f"recall@{options.k}",
                ceiling="torch mm alone",
            )
    report.finish(store=options.store)


def near(
    centres: torch.Tensor, count: int, options: Any, generator: torch.Generator
) -> torch.Tensor:
    chosen = torch.randint(len(centres), (count,), generator=generator)
    rows = centres[chosen] + 0.8 * torch.randn(count, options.dim, generator=generator)
    rows = torch.nn.functional.normalize(rows, dim=1)
    return rows.to(options.device, DTYPES[options.dtype])


def fp64_ranking(queries: torch.Tensor, bank: torch.Tensor, k: int) -> tuple[torch.Tensor, float]:
    """The best ids of the first queries, and a threshold that about half of the k-th reach."""
    scores = queries[:CHECKED].double() @ bank.double().T
    best = scores.topk(k, dim=1)
    return best.indices, float(best.values[:, -1].median()) - 1e-5  # clear of fp32 rounding


def rivals(
    queries: torch.Tensor,
    bank: torch.Tensor,
    threshold: float | None,
    wanted: torch.Tensor,
    options: Any,
) -> list[Rival]:
    def recall(result: tuple[Any, Any]) -> float:
        """Of the wanted pairs that reach the threshold, the share found."""
        found = torch.as_tensor(np.asarray(result[0][: len(wanted)].cpu()))
        scores = queries[: len(wanted)].double() @ bank.double().T
        due = scores.gather(1, wanted) >= (-2.0 if threshold is None else threshold)
        hit = (wanted.cpu()[:, :, None] == found[:, None, :]).any(2)
        return float(hit[due.cpu()].double().mean())

    def ours(backend: str) -> Callable[[], Any]:
        return lambda: topk(queries, bank, options.k, threshold, backend=backend)

    dtype = options.dtype
    found = [
        Rival(f"pymcip {row.name}", ours(row.name), recall)
        for row in backends("topk")
        if row.obstacle(options.device, dtype) is None
    ]
    if options.device == "cpu" and importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(options.dim)
        index.add(bank.float().numpy())
        asked = queries.float().numpy()

        def search() -> tuple[torch.Tensor, torch.Tensor]:
            scores, ids = index.search(asked, options.k)  # it has no threshold beside k
            return torch.from_numpy(ids), torch.from_numpy(scores)

        found.append(Rival("faiss IndexFlatIP", search, recall))
    product = torch.empty(len(queries), len(bank), dtype=queries.dtype, device=queries.device)
    found.append(Rival("torch mm alone", lambda: torch.mm(queries, bank.T, out=product)))
    return found


if __name__ == "__main__":
    main()
