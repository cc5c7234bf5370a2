"""Pseudo-captions: the captions of a corpus that lie nearest to each image."""

from pymcip.mining.mine import MineResult, mine_captions, mine_table
from pymcip.mining.search import images_per_block, search_device
from pymcip.mining.table import CaptionTable
from pymcip.mining.threshold import AutoThreshold, auto_threshold

__all__ = [
    "AutoThreshold",
    "CaptionTable",
    "MineResult",
    "auto_threshold",
    "images_per_block",
    "mine_captions",
    "mine_table",
    "search_device",
]
