"""Two commands that train, against each other: CPU seconds per step by difference, start-up, peak memory.

Each command holds {steps}. Both run at two lengths, A B B A at each, so that drift of the machine hits both alike:

    seconds per step = (taken at --long - taken at --short) / (long - short)
    start-up         = taken at --short - short x seconds per step     (imports, loading, encoding, saving)

What is taken is what the kernel says of the command and its children when it ends (wait4), so it needs nothing of the
command's own. {out} is an empty folder for each run.

    python benchmarks/pair.py --short 2 --long 8 \\
      --a "finetune lora --model SD15 --instance-dir dog --class-noun dog --output {out} --steps {steps} ..." \\
      --b "python train_dreambooth_lora.py --pretrained_model_name_or_path SD15 --output_dir {out} --max_train_steps {steps} ..."
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

LENGTHS = ("short", "long")


def main() -> None:
    options = _options()
    env = dict(word.split("=", 1) for word in options.env)
    commands = {"a": options.a, "b": options.b}
    runs: dict[str, dict[str, list[common.Usage]]] = {side: {length: [] for length in LENGTHS} for side in commands}
    order = ("a", "b", "b", "a") * options.rounds
    for length in LENGTHS:
        for side in order:
            runs[side][length].append(_run(commands[side], getattr(options, length), env))
            _tell(side, length, runs[side][length][-1])
    found = {side: _figures(runs[side], options.short, options.long) for side in commands}
    result = {"commands": commands, "names": {"a": options.name_a, "b": options.name_b}, "short": options.short, "long": options.long,
              **found, "ratio": common.ratio(found["b"]["per_step"], found["a"]["per_step"])}
    common.show(f"CPU seconds, {options.short} and {options.long} steps, A B B A", ("", "s/step", "least-most", "start-up", "wall s/step", "peak GB"),
                [_row(result["names"][side], found[side]) for side in commands])
    share = result["ratio"]
    print(f"{options.name_b} / {options.name_a}: x{share['median']:.2f} a step (x{share['least']:.2f} to x{share['most']:.2f})")
    common.write(result, options.json)


def _options() -> argparse.Namespace:
    found = common.parser("Time two commands that train.")
    for side in "ab":
        found.add_argument(f"--{side}", required=True, help="command with {steps}, and {out} for its folder")
        found.add_argument(f"--name-{side}", default=side.upper(), help="what tables call it")
    found.add_argument("--short", type=int, default=2, help="steps of the short run")
    found.add_argument("--long", type=int, default=8, help="steps of the long run")
    found.add_argument("--rounds", type=int, default=1, help="times A B B A at each length")
    found.add_argument("--env", action="append", default=["OMP_NUM_THREADS=1"], metavar="NAME=VALUE", help="for both commands; may be repeated")
    options = found.parse_args()
    if not 0 < options.short < options.long:
        found.error("--short must be at least 1 and less than --long")
    return options


def _run(command: str, steps: int, env: dict[str, str]) -> common.Usage:
    with tempfile.TemporaryDirectory() as folder:
        words = command.replace("{steps}", str(steps)).replace("{out}", os.path.join(folder, "out"))
        return common.child(words, env=env, log=Path(folder) / "log")


def _figures(runs: dict[str, list[common.Usage]], short: int, long: int) -> dict[str, Any]:
    """Per step and start-up from pairs of a short and a long run, and the largest memory."""
    steps = long - short
    per_step = [(after.cpu - before.cpu) / steps for before, after in zip(runs["short"], runs["long"], strict=True)]
    wall = [(after.wall - before.wall) / steps for before, after in zip(runs["short"], runs["long"], strict=True)]
    start = [run.cpu - short * share for run, share in zip(runs["short"], per_step, strict=True)]
    return {"per_step": per_step, "wall_per_step": wall, "start_up": start, "peak_bytes": max(run.peak_bytes for run in runs["long"]), "runs": runs}


def _row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    step, wall, start = (common.spread(found[key]) for key in ("per_step", "wall_per_step", "start_up"))
    return (name, f"{step['median']:.3f}", f"{step['least']:.3f}-{step['most']:.3f}", f"{start['median']:.1f}", f"{wall['median']:.3f}",
            common.gigabytes(found["peak_bytes"]))


def _tell(side: str, length: str, usage: common.Usage) -> None:
    print(f"{side} {length:5s} {usage.cpu:8.2f} CPU s {usage.wall:8.2f} s {common.gigabytes(usage.peak_bytes):>6s} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
