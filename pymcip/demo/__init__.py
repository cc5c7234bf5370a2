"""The demo: the whole way on a small world of real pictures with real names."""

from pymcip.demo.run import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
