"""Plan against reality: the peak `finetune plan` predicts, and the peak a run reached.

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
    found.add_argument("--steps", type=int, default=2, help="steps of a run")
    options = found.parse_args()
    results = {}
    for options.size in [options.size] if options.model else options.sizes.split(","):
        for method in options.methods.split(","):
            for rung in options.rungs.split(","):
                results[f"{options.model or options.size} {method} {rung}"] = compare(method, rung, options)
    common.show("Peak memory in GB, planned and measured", ("base, method, rung", "planned", "measured", "planned / measured"),
                [row(name, one) for name, one in results.items()])
    common.write({"runs": results}, options.json)


def compare(method: str, rung: str, options: Any) -> dict[str, Any]:
    """One prediction and one run, its artifact included."""
    values = {**common.settings_of(options), **RANKED.get(method, {}), "steps": options.steps, "memory": rung}
    run = steps.of_child(method, values)
    if "refused" in run:
        return run
    planned = predicted(method, values)
    return {"planned_bytes": planned, "measured_bytes": run["end_peak"], "ratio": planned / run["end_peak"]}


def predicted(method: str, values: dict[str, Any]) -> int:
    """What finetune's plan says of the run, in bytes: of the GPU where there is one."""
    from finetune import methods
    from finetune.model.base import pick_device
    from finetune.model.families import family_of
    from finetune.plan.estimate import predict
    from finetune.plan.skeleton import skeleton
    from finetune.settings.resolve import resolve
    from finetune.engine import apply

    kind = methods.get(method)
    settings = resolve(kind.Settings, {**steps.PLAIN, **values}, family_of=family_of)
    device = pick_device("auto").type
    return predict(apply(settings, settings.memory, kind.replaces), skeleton(settings.model), device=device).peak


def row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    if "refused" in one:
        return (name, "refused", "", "")
    return (name, common.gigabytes(one["planned_bytes"]), common.gigabytes(one["measured_bytes"]), f"{one['ratio']:.2f}")


if __name__ == "__main__":
    main()
