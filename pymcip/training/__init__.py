"""Fine-tuning: `train` is in `train.py`, from the data it opens to the weights it exports."""

from pymcip.training.callbacks import Callbacks, TrainState
from pymcip.training.result import TrainResult
from pymcip.training.train import train

__all__ = ["Callbacks", "TrainResult", "TrainState", "train"]
