"""The options of every stage, one frozen dataclass each; the command line is made from them."""

from pymcip.configs.options import Config, Source, Sources, Workers, option, read_options, required
from pymcip.configs.search import IndexConfig, SearchConfig, ServeConfig
from pymcip.configs.stages import (
    CheckConfig,
    DemoConfig,
    EmbedConfig,
    EvaluateConfig,
    ExportConfig,
    MineConfig,
    ModelOptions,
    RunsConfig,
)
from pymcip.configs.sweep import SweepConfig
from pymcip.configs.train import TrainConfig, TrainSettings

__all__ = [
    "CheckConfig", "Config", "DemoConfig", "EmbedConfig", "EvaluateConfig", "ExportConfig", "IndexConfig",
    "MineConfig", "ModelOptions", "RunsConfig", "SearchConfig", "ServeConfig", "Source", "Sources", "SweepConfig", "TrainConfig",
    "TrainSettings", "Workers",
    "option", "read_options", "required",
]  # fmt: skip
