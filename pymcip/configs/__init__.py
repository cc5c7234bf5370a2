"""The options of every stage, one frozen dataclass each; the command line is made from them."""

from pymcip.configs.demo import DemoConfig
from pymcip.configs.embed import EmbedConfig
from pymcip.configs.evaluate import EvaluateConfig
from pymcip.configs.export import ExportConfig
from pymcip.configs.mine import MineConfig
from pymcip.configs.model import ModelOptions
from pymcip.configs.options import Config, Source, Sources, option, read_options, required
from pymcip.configs.sweep import SweepConfig
from pymcip.configs.train import TrainConfig

__all__ = [
    "Config",
    "DemoConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "ExportConfig",
    "MineConfig",
    "ModelOptions",
    "Source",
    "Sources",
    "SweepConfig",
    "TrainConfig",
    "option",
    "read_options",
    "required",
]
