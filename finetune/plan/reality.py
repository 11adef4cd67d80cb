"""Plan against reality: what training says at its end, and measured runs for the table in docs/plan.md."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from finetune import runs


def compare(prediction: Any, manifest: dict[str, Any]) -> list[str]:
    """One or two lines: the predicted peak beside the measured one, and the artifact's bytes where they were predicted.

    Args:
        prediction: a `Prediction`, or its `as_dict()`.
        manifest: of a finished run.
    """
    told = prediction if isinstance(prediction, dict) else prediction.as_dict()
    real, planned = manifest.get("peak_memory_bytes", 0), told["peak"]
    if not real:
        return []
    off = planned / real - 1
    lines = [f"memory: {size(real)} at most; planned were {size(planned)} ({off:+.0%}), most in {told['moment']}"]
    if "artifact" in told and "artifact" in manifest:
        same = told["artifact"] == manifest["artifact"]["bytes"]
        lines.append(f"artifact: {manifest['artifact']['bytes']:,} bytes, " + ("as planned" if same else f"planned were {told['artifact']:,}"))
    return lines


def size(number: float) -> str:
    """Bytes for people: 3.2 GB, 480 MB, 12 KB (steps of 1000)."""
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if number >= step:
            return f"{number / step:.{0 if number >= 100 * step else 1}f} {unit}"
    return f"{number:.0f} bytes"


def measure(method: str, model: str, pictures: Path, **settings: Any) -> dict[str, Any]:
    """Train in a process of its own and predict in another; returns the manifest with `planned`, the prediction, beside it.

    Args:
        settings: of the method, by key, as flags take them; steps 2 and no validation unless given.
    """
    given = {"steps": 2, "validate_every": 0, "checkpoint_every": 0, "class_noun": "dog"} | settings
    with tempfile.TemporaryDirectory() as folder:
        told = json.dumps({"method": method, "model": model, "instance_dir": str(pictures), **given})
        planned = _python("from finetune.plan.reality import _plan; _plan()", told)
        flags = [word for key, value in {"model": model, "instance_dir": pictures, "output": Path(folder) / "run", **given}.items() for word in _flag(key, value)]
        subprocess.run([sys.executable, "-m", "finetune", method, *flags], check=True, capture_output=True)
        return runs.read_json(Path(folder) / "run" / "manifest.json") | {"planned": json.loads(planned)}


def _flag(key: str, value: Any) -> list[str]:
    name = "--" + key.replace("_", "-")
    if isinstance(value, bool):
        return [name if value else f"--no-{name[2:]}"]
    return [name, str(value)]


def _python(code: str, text: str) -> str:
    return subprocess.run([sys.executable, "-c", code], input=text, check=True, capture_output=True, text=True).stdout.splitlines()[-1]


def _plan() -> None:
    """Read a run's settings from standard input as JSON, print its prediction as JSON."""
    from finetune import methods
    from finetune.plan import process
    from finetune.plan.estimate import predict
    from finetune.plan.skeleton import family_of, skeleton
    from finetune.settings import resolve

    told = json.loads(sys.stdin.read())
    base = skeleton(told["model"])
    own = process.own()
    tree = methods.get(told.pop("method")).Settings
    settings = resolve(tree, told, None, family_of)
    print(json.dumps(predict(settings, base, process=own).as_dict()))
