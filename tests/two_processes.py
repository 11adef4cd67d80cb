"""What each process of a torchrun launch does in tests/test_training_resume.py: one run whole, the same stopped by a signal and resumed.

    torchrun --nproc-per-node 2 tests/two_processes.py TOLD.json
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from finetune.cli import quiet

quiet.hush()
quiet.hide()

from rich.console import Console  # noqa: E402 - after the libraries were made quiet

from finetune import methods  # noqa: E402
from finetune.training import run  # noqa: E402


def main() -> None:
    """Reads settings by name, trains into TOLD's folder: whole, and stopped after a step then resumed."""
    told = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    console, real = Console(file=open(os.devnull, "w"), width=80), run.fit  # noqa: SIM115 - lives as long as the console

    def stops(*arguments: Any) -> Any:
        for progress in real(*arguments):
            yield progress
            if progress.step == told["stop"] and os.environ["RANK"] == "1":  # only one process hears it; both must stop
                os.kill(os.getpid(), signal.SIGTERM)

    for name, settings in told["cases"].items():
        folder = Path(told["folder"]) / name
        make = methods.get(settings.pop("method")).Settings
        run.train(make(**settings, output=folder / "whole"), console)
        run.fit = stops
        run.train(make(**settings, output=folder / "stopped"), console)
        run.fit = real
        if os.environ["RANK"] == "0":
            (folder / "status").write_text(json.loads((folder / "stopped" / "manifest.json").read_text())["status"])
        run.train(make(**settings, output=folder / "stopped", resume=True), console)


if __name__ == "__main__":
    main()
