"""Peak memory of training, and seconds per step, for each rung of the memory ladder and each method.

    python benchmarks/memory.py --size small
    python benchmarks/memory.py --size sd15 --methods lora --rungs fast,low --steps 2
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
import steps

RANKED = {"lora": {"rank": 4, "targets": "attention"}}


def main() -> None:
    found = common.parser("Peak memory per rung and method.")
    common.add_model(found)
    found.add_argument("--methods", default="lora,textual-inversion,hypernetwork,dreambooth", help="split by commas")
    found.add_argument("--rungs", default="fast,low,lowest", help="split by commas")
    found.add_argument("--steps", type=int, default=3, help="steps of a run; the first is not counted in the time")
    found.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of finetune; may be repeated")
    options = found.parse_args()
    extra = dict(word.split("=", 1) for word in options.set)
    results = {f"{method} {rung}": measure(method, rung, options, extra) for method in options.methods.split(",") for rung in options.rungs.split(",")}
    common.show(f"Peak memory in GB, {options.model or options.size}", ("method, rung", "before step 1", "steps", "with artifact", "s/step", "loss"),
                [row(name, one) for name, one in results.items()])
    common.write({"size": options.size, "settings": extra, "runs": results}, options.json)


def measure(method: str, rung: str, options: Any, extra: dict[str, str]) -> dict[str, Any]:
    """One run in a process of its own."""
    run = steps.of_child(method, {**common.settings_of(options), **RANKED.get(method, {}), "steps": options.steps, "memory": rung, **extra})
    if "refused" in run:
        return run
    return {"start_peak_bytes": run["start_peak"], "peak_bytes": run["peak_bytes"], "end_peak_bytes": run["end_peak"], "losses": run["losses"],
            "per_step": common.spread([step[common.clock()] for step in run["steps"]])["median"]}


def row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    if "refused" in one:
        return (name, one["refused"][:40], "", "", "", "")
    return (name, *(common.gigabytes(one[key]) for key in ("start_peak_bytes", "peak_bytes", "end_peak_bytes")), f"{one['per_step']:.3f}",
            f"{one['losses'][-1]:.4f}")


if __name__ == "__main__":
    main()
