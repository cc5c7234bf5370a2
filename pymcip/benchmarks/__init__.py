"""The paper's benchmarks (arXiv 2409.01936, Table 1), read from their public layouts on the disk.

`pymcip.benchmarks.registry` lists them; `contract` says what a data set and a benchmark are.
"""

from pymcip.benchmarks import paper
from pymcip.benchmarks.contract import Benchmark, DataSet, SuiteOptions
from pymcip.benchmarks.registry import BENCHMARKS, DATA_SETS, PAPER, SUITES, listing
from pymcip.benchmarks.suite import Found, SuiteScores, find_suite, measure_suite

__all__ = [
    "BENCHMARKS",
    "DATA_SETS",
    "PAPER",
    "SUITES",
    "Benchmark",
    "DataSet",
    "Found",
    "SuiteOptions",
    "SuiteScores",
    "find_suite",
    "listing",
    "measure_suite",
    "paper",
]
