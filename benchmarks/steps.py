"""One training run by finetune's own code, each step measured from inside; run as a child, so that its memory is its own.

    python benchmarks/steps.py METHOD --settings '{"model": "...", ...}' [--warm 2]      prints one line of JSON
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

PLAIN = {"prior": "none", "accumulate": 1, "schedule": "constant", "warmup": 0, "validate_every": 0, "checkpoint_every": 0, "overwrite": True}


class Enough(Exception):
    """Ends a run from inside its loop."""


def train(method: str, values: dict[str, Any], around: Callable[..., Iterator[Any]]) -> None:
    """`finetune METHOD` with the loop handed over: `around(fit, *arguments)` is iterated in its place.

    Everything before the first step is what training does: pictures, base, kernels, optimizer. Enough ends it without an artifact.
    """
    from rich.console import Console

    from finetune import methods
    from finetune.model.families import family_of
    from finetune.settings.resolve import resolve
    from finetune.training import run

    kept = run.fit
    run.fit = lambda *arguments, **named: around(kept, *arguments, **named)
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings = resolve(methods.get(method).Settings, {**PLAIN, "output": Path(folder) / "run", **values}, family_of=family_of)
            with contextlib.suppress(Enough):
                run.train(settings, Console(file=io.StringIO()))
    finally:
        run.fit = kept


def run_steps(method: str, values: dict[str, Any], warm: int) -> dict[str, Any]:
    """Train for `values["steps"]` steps; what each took, and the peak before the artifact is written.

    Args:
        warm: first steps that are left out of `steps` (pages touched, kernels chosen).
    """
    found: dict[str, Any] = {"steps": [], "losses": []}

    def around(fit: Any, *arguments: Any, **named: Any) -> Iterator[Any]:
        found["start_cpu"], found["start_peak"] = time.process_time(), _peak()
        inner = fit(*arguments, **named)
        while True:
            took: list[Any] = []
            usage = common.measure(lambda: took.append(next(inner, None)))
            if took[0] is None:
                break
            found["steps"].append({**asdict(usage), "cpu": usage.cpu})
            found["losses"].append(float(took[0].loss))
            found["peak_bytes"] = _peak()
            yield took[0]

    train(method, values, around)
    return {**found, "first": found["steps"][0], "steps": found["steps"][warm:], "end_peak": _peak()}


def _peak() -> int:
    """Largest memory so far in bytes: of the GPU where there is one, else of the process."""
    torch = sys.modules["torch"]
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def of_child(method: str, values: dict[str, Any], warm: int = 1, env: dict[str, str] | None = None) -> dict[str, Any]:
    """`run_steps` in a process of its own; `refused` instead where finetune says no to the settings."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "steps.json", Path(folder) / "log"
        words = [sys.executable, __file__, method, "--settings", json.dumps(values, default=str), "--warm", str(warm), "--out", str(out)]
        usage = common.child(words, env=env, log=log)
        found = json.loads(out.read_text())
        return {**found, "child": {**asdict(usage), "cpu": usage.cpu}}


def main() -> None:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("method")
    found.add_argument("--settings", required=True, help="JSON: finetune's settings by name, with steps")
    found.add_argument("--warm", type=int, default=1, help="first steps not counted")
    found.add_argument("--out", type=Path, default=Path("/dev/stdout"))
    options = found.parse_args()
    from finetune.errors import Problem

    try:
        result = run_steps(options.method, json.loads(options.settings), options.warm)
    except Problem as problem:
        result = {"refused": str(problem)}
    options.out.write_text(json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)  # no time for taking a base apart


if __name__ == "__main__":
    main()
