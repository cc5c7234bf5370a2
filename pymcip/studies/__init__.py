"""Studies: one option after the other, image search against text search, as table and plot."""

from pymcip.studies.run import SweepResult, sweep
from pymcip.studies.tables import pareto_front

__all__ = ["SweepResult", "pareto_front", "sweep"]
