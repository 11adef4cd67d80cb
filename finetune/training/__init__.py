"""Training: one loop for every method, checkpoints that resume exactly, and the run around it."""

from finetune.training.loop import fit
from finetune.training.run import train

__all__ = ["fit", "train"]
