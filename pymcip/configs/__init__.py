"""The options of every stage: one frozen dataclass each. Needs no torch."""

from pymcip.configs.options import (
    BUDGET,
    Config,
    DemoConfig,
    EmbedConfig,
    EvaluateConfig,
    ExportConfig,
    MineConfig,
    ModelOptions,
    Source,
    Sources,
    SweepConfig,
    TrainConfig,
    option,
    read_options,
    required,
)

__all__ = [
    "BUDGET",
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
