"""bitsandbytes, which costs seconds to import and is imported for 8 and 4 bits alone.

diffusers and PEFT import it wherever they find it, and with it torch's compiler, for quantized layers of theirs that nothing here
uses. The command line therefore hides it from them (`finetune.cli.quiet.hide`): an entry None in sys.modules is what "not
installed" looks like. A library must not do that to the program that uses it, so it is done there and nowhere else.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder
from typing import Any

NAME = "bitsandbytes"


def available() -> bool:
    """Whether it is installed, hidden or not."""
    return PathFinder.find_spec(NAME) is not None


def load(part: str) -> Any:
    """One of its modules, such as "optim".

    Raises:
        ImportError: it is not installed.
    """
    if sys.modules.get(NAME, NAME) is None:
        del sys.modules[NAME]
    return importlib.import_module(f"{NAME}.{part}")
