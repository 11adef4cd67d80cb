"""Plan against reality: the peak and the seconds per step `finetune plan` predicts, and those of a run.

On a CPU, with one thread: the run's seconds are of the processor, so that other work beside does not count.

    python benchmarks/plan.py --sizes tiny,small
    python benchmarks/plan.py --sizes sd15 --methods lora --resolutions 256 --rungs fast,low
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
    found = common.parser("Predicted and measured peak memory.")
    common.add_model(found, "tiny")
    found.add_argument("--sizes", default="tiny,small", help="widths of random bases, split by commas; not with --model")
    found.add_argument("--methods", default="lora,textual-inversion,hypernetwork,dreambooth", help="split by commas")
    found.add_argument("--rungs", default="fast,low", help="split by commas")
    found.add_argument("--steps", type=int, default=4, help="steps of a run; the first is not counted in the time")
    options = found.parse_args()
    results = {}
    for options.size in [options.size] if options.model else options.sizes.split(","):
        for method in options.methods.split(","):
            for rung in options.rungs.split(","):
                results[f"{options.model or options.size} {method} {rung}"] = compare(method, rung, options)
    common.show("Peak memory in GB and seconds per step, planned and measured", ("base, method, rung", "GB", "was", "ratio", "s/step", "was", "ratio"),
                [row(name, one) for name, one in results.items()])
    common.write({"runs": results}, options.json)


def compare(method: str, rung: str, options: Any) -> dict[str, Any]:
    """One prediction and one run, its artifact included."""
    values = {**common.settings_of(options), **RANKED.get(method, {}), "steps": options.steps, "memory": rung}
    run = steps.of_child(method, values)
    if "refused" in run:
        return run
    planned, seconds = predicted(method, values)
    took = common.spread([step[common.clock()] for step in run["steps"]])["median"]
    return {"planned_bytes": planned, "measured_bytes": run["end_peak"], "ratio": planned / run["end_peak"],
            "planned_seconds": seconds, "measured_seconds": took, "ratio_seconds": seconds / took}


def predicted(method: str, values: dict[str, Any]) -> tuple[int, float]:
    """What finetune's plan says of the run: bytes, of the GPU where there is one, and seconds per step."""
    from finetune import methods
    from finetune.model.base import pick_device
    from finetune.model.families import family_of
    from finetune.plan.estimate import predict
    from finetune.plan.pace import Pace, step_seconds
    from finetune.plan.skeleton import skeleton
    from finetune.settings.resolve import resolve
    from finetune.engine import apply

    kind = methods.get(method)
    settings = resolve(kind.Settings, {**steps.PLAIN, **values}, family_of=family_of)
    device = pick_device("auto").type
    base = skeleton(settings.model)
    found = predict(apply(settings, settings.memory, kind.replaces), base, device=device, record=True)
    return found.peak, step_seconds(Pace(), found.rehearsal, settings, base)[0]


def row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    if "refused" in one:
        return (name, "refused")
    return (name, common.gigabytes(one["planned_bytes"]), common.gigabytes(one["measured_bytes"]), f"{one['ratio']:.2f}",
            f"{one['planned_seconds']:.2f}", f"{one['measured_seconds']:.2f}", f"{one['ratio_seconds']:.2f}")


if __name__ == "__main__":
    main()
