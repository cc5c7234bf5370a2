"""Fine-tuning: `train` is in `train.py`, from the data it opens to the weights it exports."""

from pymcip.training.result import TrainResult
from pymcip.training.train import train

__all__ = ["TrainResult", "train"]
