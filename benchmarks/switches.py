"""Each switch by itself: the same run with it and without it, A B B A, every run in a process of its own.

For each: seconds per step without / with (above 1: faster with it), peak memory of both, and the largest relative
difference of the losses of the same steps (0: the same to the bit as far as the loss shows).

    python benchmarks/switches.py --size small
    python benchmarks/switches.py --size sd15 --only pack,channels_last --steps 4
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
import steps

RANKED = {"lora": {"rank": 4, "targets": "attention"}}


@dataclass(frozen=True)
class Switch:
    """Settings with the switch on and off, and the method that shows it best."""

    name: str
    method: str
    on: dict[str, Any]
    off: dict[str, Any]


IN_BACKWARD = {"clip_norm": 0.0}
SWITCHES = (
    Switch("lean", "lora", {"lean": True}, {"lean": False}),
    Switch("pack", "lora", {"pack": "on"}, {"pack": "off"}),
    Switch("channels_last", "lora", {"channels_last": True, "pack": "off"}, {"channels_last": False, "pack": "off"}),
    Switch("freed_memory", "dreambooth", {"freed_memory": "keep"}, {"freed_memory": "library"}),
    Switch("step_in_backward", "dreambooth", {"step_in_backward": True, **IN_BACKWARD}, {"step_in_backward": False, **IN_BACKWARD}),
    Switch("adamw8bit", "dreambooth", {"optimizer": "adamw8bit"}, {"optimizer": "adamw"}),
    Switch("checkpointing", "lora", {"gradient_checkpointing": True}, {"gradient_checkpointing": False}),
    Switch("rest", "lora", {"rest": True}, {"rest": False}),
    Switch("bf16", "lora", {"precision": "bf16"}, {"precision": "fp32"}),
    Switch("bf16_chunked", "lora", {"precision": "bf16", "attention": "chunked"}, {"precision": "bf16", "attention": "sdpa"}),
    Switch("frozen_bf16", "lora", {"frozen": "bf16"}, {"frozen": "fp32"}),
    Switch("frozen_8bit", "lora", {"frozen": "8bit"}, {"frozen": "fp32"}),
    Switch("frozen_4bit", "lora", {"frozen": "4bit"}, {"frozen": "fp32"}),
    Switch("compile", "lora", {"compile": True}, {"compile": False}),
)


def main() -> None:
    found = common.parser("Each switch by itself, on and off.")
    common.add_model(found)
    found.add_argument("--only", help="names split by commas [default: all but compile]")
    found.add_argument("--method", help="for all of them, instead of the one that shows it best")
    found.add_argument("--steps", type=int, default=8, help="steps of a run, the first of which is not counted")
    found.add_argument("--rounds", type=int, default=2, help="runs of each side, A B B A")
    options = found.parse_args()
    wanted = options.only.split(",") if options.only else [switch.name for switch in SWITCHES if switch.name != "compile"]
    results = {}
    for switch in SWITCHES:
        if switch.name in wanted and known(switch):
            results[switch.name] = compare(switch, options)
    common.show(f"{common.clock()} seconds per step, {options.model or options.size}: without / with", ("switch", "method", "without", "with", "gain", "GB w/o", "GB", "loss diff"),
                [row(name, one) for name, one in results.items()])
    common.write({"size": options.size, "switches": results}, options.json)


def known(switch: Switch) -> bool:
    """Whether this version of finetune has the settings."""
    from finetune import methods

    return {*switch.on, *switch.off} <= set(methods.get(switch.method).Settings.model_fields)


def compare(switch: Switch, options: Any) -> dict[str, Any]:
    """Runs of both sides in turn; or the refusal, where this machine cannot do it."""
    method = options.method or switch.method
    shared = {**common.settings_of(options), **RANKED.get(method, {}), "steps": options.steps}
    taken: dict[str, list[dict[str, Any]]] = {"on": [], "off": []}
    for turn in range(options.rounds):
        for side in ("on", "off") if turn % 2 == 0 else ("off", "on"):
            run = steps.of_child(method, {**shared, **getattr(switch, side)})
            if "refused" in run:
                return {"method": method, "refused": run["refused"]}
            taken[side].append(run)
    times = {side: [common.spread([step[common.clock()] for step in run["steps"]])["median"] for run in runs] for side, runs in taken.items()}
    losses = [max(abs(a - b) / abs(b) for a, b in zip(on["losses"], off["losses"], strict=True)) for on, off in zip(taken["on"], taken["off"], strict=True)]
    return {"method": method, "on": times["on"], "off": times["off"], "gain": common.ratio(times["off"], times["on"]), "loss_difference": max(losses),
            "faults": {side: runs[0]["steps"][-1]["minor_faults"] for side, runs in taken.items()},
            "peak_bytes": {side: max(run["peak_bytes"] for run in runs) for side, runs in taken.items()}}


def row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    if "refused" in one:
        return (name, one["method"], "refused", "", "", "", "", "")
    gain = one["gain"]
    return (name, one["method"], *(f"{common.spread(one[side])['median']:.3f}" for side in ("off", "on")), f"x{gain['median']:.2f}",
            *(common.gigabytes(one["peak_bytes"][side]) for side in ("off", "on")), f"{one['loss_difference']:.0e}")


if __name__ == "__main__":
    main()
