"""Silences what third parties say and the user can do nothing about. Runs before anything heavy is imported."""

from __future__ import annotations

import os
import sys
import warnings

SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",  # forked loaders would each warn
    "ACCELERATE_LOG_LEVEL": "ERROR",
}

# (start of the message, module): the fix, if there is one, is theirs.
WARNINGS = [
    (r".*torchvision.*", ""),  # transformers falls back to PIL, which is what we want
    ("", r"transformers\..*"),
    ("", r"diffusers\..*"),
    ("", r"huggingface_hub\..*"),
    ("", r"peft\..*"),
    (r".*lr_scheduler\.step\(\).*", ""),
    (r".*pin_memory.*", ""),  # no accelerator: nothing to pin
    (r".*torch\.cuda\.amp.*", ""),
]


def hush() -> None:
    """Set the environment and warning filters; a variable the user set himself stays."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for message, module in WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=module)


def hide() -> None:
    """Keep libraries from importing bitsandbytes for nothing, see `finetune.engine.quantizer`."""
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


def libraries() -> None:
    """Switch off the bars that flash by while weights are read from disk; downloads keep theirs."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
