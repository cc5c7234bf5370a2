"""Searching in one's own images: an index of them, kept up to date, asked by texts and pictures."""

from pymcip.search.build import IndexResult, build_index
from pymcip.search.index import Hit, Index

__all__ = ["Hit", "Index", "IndexResult", "build_index"]
