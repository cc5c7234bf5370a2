"""Studies: one option after the other, image search against text search, as table and plot."""

from pymcip.studies.front import pareto_front
from pymcip.studies.run import SweepResult, sweep

__all__ = ["SweepResult", "pareto_front", "sweep"]
