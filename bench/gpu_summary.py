"""What a GPU check found, from its files: steps, tests, the goals beside what was measured, rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_runner import ROWS, STEPS, TESTS

KINDS = {  # pytest's words
    "passed": ("PASSED",),
    "failed": ("FAILED", "ERROR", "XPASS"),
    "skipped": ("SKIPPED", "XFAIL"),
}
FIGURES = {  # the rows' own names
    "x G": "times_ceiling",
    "of G": "of_ceiling",
    "x faster": "times_ceiling",
    "of its memory": "peak_bytes",
}


@dataclass(frozen=True)
class Select:
    """Rows of a bench whose case holds these values, of rivals called so or "so (more)"."""

    bench: str
    rival: str
    case: Mapping[str, Any]

    def __call__(self, row: Mapping[str, Any]) -> bool:
        name, case = row.get("rival", ""), row.get("case", {})
        return (
            row["bench"] == self.bench
            and (name == self.rival or name.startswith(self.rival + " "))
            and all(case.get(key) == value for key, value in self.case.items())
        )


@dataclass(frozen=True)
class Goal:
    """A figure of ours, alone or beside a rival's, and what it should reach.

    figure: "x G": our time as a multiple of a plain product's. "of G": our rate as a share of its.
        "x faster": a rival's time over ours, both in G of their own processes. "of its memory":
        our peak as a share of a rival's. The best row of each side counts.
    """

    name: str
    figure: str
    must: float
    extreme: float | None
    ours: Select
    rival: Select | None = None

    def measured(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """The figure, and which bound it reaches; otherwise why there is none."""
        key = FIGURES[self.figure]
        best = []
        for select in (self.ours, self.rival):
            if select is None:
                continue
            own = [row for row in rows if select(row)]
            values = [float(row[key]) for row in own if row.get(key) is not None]
            if not values:
                errors = [f"{row['rival']} failed: {row['error']}" for row in own if "error" in row]
                return errors[-1] if errors else "not measured"
            best.append(max(values) if key == "of_ceiling" else min(values))
        value = best[0]
        if self.rival is not None:
            value = best[1] / best[0] if self.figure == "x faster" else best[0] / best[1]
        return f"{value:.2f}, {self._reached(value)}"

    def _reached(self, value: float) -> str:
        sign = 1 if self.figure in ("of G", "x faster") else -1  # at least, or at most
        if self.extreme is not None and sign * value >= sign * self.extreme:
            return "extreme reached"
        return "reached" if sign * value >= sign * self.must else "missed"


def _goals() -> list[Goal]:
    size = {"B": 4096, "C": 1_000_320, "D": 768}

    def margin(mode: str, rival: str = "pymcip triton") -> Select:
        return Select("margin_softmax", rival, {"mode": mode, **size})

    def topk(rival: str, **case: Any) -> Select:
        return Select("topk", rival, {"D": 768, "k": 10, "threshold": None, **case})

    mc, kept = margin("mc"), margin("arc kept")
    halves = {"M": 4_000_000}
    fp32 = {"M": 2_000_000, "N": 2048}
    return [
        Goal("forward", "x G", 1.15, 1.03, margin("forward")),
        Goal("MCArcMargin", "x G", 2.6, 2.2, mc),
        Goal("MCArcMargin, filtered", "x G", 1.5, 1.2, margin("mc filtered")),
        Goal("ArcMargin, E kept", "x G", 3.7, 3.25, kept),
        Goal("ArcMargin, E anew", "x G", 5.0, 4.4, margin("arc")),
        Goal("ArcMargin, filtered", "x G", 1.8, 1.3, margin("arc filtered")),
        *(
            Goal(f"{name}, {loss}", "x faster", must, extreme, own, margin(mode, rival))
            for name, rival, must, extreme in (
                ("torch.compile ArcFace", "torch.compile ArcFace", 2.0, 3.0),
                ("cce", "cce", 1.8, 3.0),
                ("cce_exact", "cce_exact", 3.0, 5.0),
                ("quack", "quack", 1.0, 1.15),
            )
            for loss, mode, own in (("MCArcMargin", "mc", mc), ("ArcMargin", "arc", kept))
        ),
        Goal("siglip, ArcMargin", "x faster", 1.5, 1.8, kept, margin("arc", "siglip")),
        Goal(
            "torch.compile ArcFace, MCArcMargin", "of its memory", 0.1, None,
            mc, margin("mc", "torch.compile ArcFace"),
        ),
        Goal("quack, MCArcMargin", "of its memory", 0.125, None, mc, margin("mc", "quack")),
        *(
            Goal(f"top-k {kind}, N = {count}", "of G", must, extreme, topk(rival, N=count, **halves))
            for kind, rival, must, extreme in (
                ("bf16", "pymcip cuda, screen", 0.92, None),
                ("INT8, ranked again", "pymcip cuda", 1.4, 1.6),
                ("INT8, ranked again, bank packed before", "pymcip packed", 1.4, 1.6),
            )
            for count in (8192, 2048)
        ),
        Goal("faiss-gpu", "x faster", 10.0, None, topk("pymcip cuda", **fp32), topk("faiss-gpu", **fp32)),
        Goal(
            "torch bf16 mm+topk", "x faster", 5.0, None,
            topk("pymcip cuda", **fp32), topk("torch bf16 mm+topk", **fp32),
        ),
    ]  # fmt: skip


GOALS = _goals()


def results(out: Path) -> list[dict[str, Any]]:
    """Of each planned step: name, purpose, needed, result, seconds, detail."""
    lines = _lines(out / STEPS)
    plan: list[dict[str, Any]] = next((line["plan"] for line in lines if "plan" in line), [])
    begun = {line["begin"] for line in lines if "begin" in line}
    ended = {line["end"]: line for line in lines if "end" in line}
    found = []
    for step in plan:
        result = "killed with the check" if step["name"] in begun else "cut"
        nothing = {"result": result, "seconds": None, "detail": ""}
        found.append({**nothing, **ended.get(step["name"], {}), **step})
    return found


def is_good(out: Path) -> bool:
    """Whether what has to pass has passed, some test of each kind, and nothing that must not fail."""
    tests = _outcomes(out)
    tested = {line[1] for line in tests} == {line[1] for line in tests if line[0] == "PASSED"}
    return tested and all(
        step["result"] == "passed"
        if step["needed"] == "pass"
        else step["result"] != "failed" or not step["needed"]
        for step in results(out)
    )


def summary(out: Path) -> str:
    """Markdown. The goals come last, where a terminal shows them."""
    rows, found = _lines(out / ROWS), results(out)
    facts: dict[str, Any] = next((line for line in _lines(out / STEPS) if "plan" in line), {})
    first = rows[0] if rows else {}
    text = [f"# GPU check of {facts.get('time')}", ""]
    text.append(f"Device: {first.get('device')}, commit: {first.get('commit')}")
    text.append(f"Missing: {', '.join(facts.get('missing', [])) or 'nothing'}")
    text += ["", "| bench | case | rival | p50, ms | rate | x G |", "|---|---|---|---:|---:|---:|"]
    text += [_measured(row) for row in rows]
    text += ["", "| step | for | result | s | |", "|---|---|---|---:|---|"]
    for step in found:
        seconds = "" if step["seconds"] is None else f"{step['seconds']:.0f}"
        text.append(_row(step["name"], step["purpose"], step["result"], seconds, step["detail"]))
    counts = Counter(step["result"] for step in found)
    text += ["", "Steps: " + ", ".join(f"{count} {name}" for name, count in counts.items())]
    text += [*_tests(out), "", "| goal | figure | must | extreme | measured |"]
    text.append("|---|---|---:|---:|---|")
    for goal in GOALS:
        extreme = "" if goal.extreme is None else f"{goal.extreme:g}"
        text.append(_row(goal.name, goal.figure, f"{goal.must:g}", extreme, goal.measured(rows)))
    return "\n".join(text) + "\n"


def _outcomes(out: Path) -> list[list[str]]:
    """Of each test: pytest's word, step, name."""
    path = out / TESTS
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [line.split("\t") for line in text.splitlines()]


def _tests(out: Path) -> list[str]:
    """Counts, and the names of those that failed."""
    lines = _outcomes(out)
    found = {kind: [line for line in lines if line[0] in words] for kind, words in KINDS.items()}
    counts = ", ".join(f"{len(own)} {kind}" for kind, own in found.items())
    return [f"Tests: {counts}", *(f"- {' '.join(line)}" for line in found["failed"])]


def _measured(row: Mapping[str, Any]) -> str:
    case = ", ".join(f"{name} {value}" for name, value in row.get("case", {}).items())
    if "seconds" not in row:
        return _row(row["bench"], case, row.get("rival", ""), row.get("error", ""), "", "")
    times = row.get("times_ceiling")
    return _row(
        row["bench"],
        case,
        row["rival"],
        f"{row['seconds']['p50'] * 1e3:.2f}",
        f"{row['rate']:.4g} {row['unit']}",
        "" if times is None else f"{times:.2f}",
    )


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; the last one may have been cut off."""
    found = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found
