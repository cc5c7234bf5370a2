"""Pseudo-captions: the captions of a corpus that lie nearest to each image."""

from pymcip.mining.given import GivenTable
from pymcip.mining.mine import MineResult, mine_captions, mine_table
from pymcip.mining.report import AutoThreshold, auto_threshold
from pymcip.mining.search import images_per_block, search_device
from pymcip.mining.table import CaptionLists, CaptionTable, bounds_of

__all__ = [
    "AutoThreshold",
    "CaptionLists",
    "CaptionTable",
    "GivenTable",
    "MineResult",
    "auto_threshold",
    "bounds_of",
    "images_per_block",
    "mine_captions",
    "mine_table",
    "search_device",
]
