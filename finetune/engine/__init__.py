"""How a run uses the machine: number formats of frozen weights, kernels, the optimizer's kind, the memory ladder.

Every part has a setting that turns it off, and is off by itself where it does not pay. None knows a method or the loop.
"""

from finetune.engine.frozen import autocast, format_of, possible, store, weights_dtype
from finetune.engine.ladder import RUNGS, apply
from finetune.engine.optimizer import InBackward, make_optimizer
from finetune.engine.pages import freed_memory, set_pages
from finetune.engine.speed import speed_up

__all__ = ["RUNGS", "InBackward", "apply", "autocast", "format_of", "freed_memory", "make_optimizer", "possible", "set_pages", "speed_up", "store", "weights_dtype"]
