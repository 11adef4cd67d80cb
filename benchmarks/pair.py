"""Two commands that train, against each other: CPU seconds per step by difference, start-up, peak memory.

Each command holds {steps}. Both run at two lengths, A B B A at each, so that drift of the machine hits both alike. With
--slice 2 the two run at the same time and take turns of two seconds (SIGSTOP, SIGCONT), which shares the drift far better
where other work disturbs the machine; then memory must hold both.

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
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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
    for _ in range(options.rounds):
        for length in LENGTHS:
            for sides in (("a", "b"), ("b", "a")):
                taken = _both([commands[side] for side in sides], getattr(options, length), env, options)
                for side, usage in zip(sides, taken, strict=True):
                    runs[side][length].append(usage)
                    _tell(side, length, usage)
    found = {side: _figures(runs[side], options.short, options.long) for side in commands}
    result = {"commands": commands, "names": {"a": options.name_a, "b": options.name_b}, "short": options.short, "long": options.long, "slice": options.slice,
              **found, "ratio": common.ratio(found["b"]["per_step"], found["a"]["per_step"])}
    columns = ("", "s/step", "least-most", "start-up", *(() if options.slice else ("wall s/step",)), "peak GB")
    common.show(f"CPU seconds, {options.short} and {options.long} steps, A B B A", columns,
                [_row(result["names"][side], found[side], bool(options.slice)) for side in commands])
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
    found.add_argument("--slice", type=float, default=0.0, help="run both at once in turns of so many seconds; 0: one after the other")
    found.add_argument("--before", help="command to run before each measurement, to quieten the machine")
    found.add_argument("--after", help="command to run after it")
    found.add_argument("--env", action="append", default=["OMP_NUM_THREADS=1"], metavar="NAME=VALUE", help="for both commands; may be repeated")
    options = found.parse_args()
    if not 0 < options.short < options.long:
        found.error("--short must be at least 1 and less than --long")
    return options


def _both(commands: Sequence[str], steps: int, env: dict[str, str], options: argparse.Namespace) -> list[common.Usage]:
    """Run the two, one after the other or in slices, with --before and --after around each measurement."""
    if options.slice:
        with _quiet(options):
            return _sliced(commands, steps, env, options.slice)
    found = []
    for command in commands:
        with _quiet(options), tempfile.TemporaryDirectory() as folder:
            found.append(common.child(_words(command, steps, folder), env=env, log=Path(folder) / "log"))
    return found


@contextlib.contextmanager
def _quiet(options: argparse.Namespace) -> Iterator[None]:
    if options.before:
        subprocess.run(shlex.split(options.before), check=True)
    try:
        yield
    finally:
        if options.after:
            subprocess.run(shlex.split(options.after), check=True)


def _sliced(commands: Sequence[str], steps: int, env: dict[str, str], seconds: float) -> list[common.Usage]:
    """Run the two in turns of some seconds until both have ended."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        folders = [Path(first), Path(second)]
        started, processes, found = time.perf_counter(), [], {}
        for command, folder in zip(commands, folders, strict=True):
            with (folder / "log").open("w") as log:
                processes.append(subprocess.Popen(_words(command, steps, str(folder)), env={**os.environ, **env}, stdout=log,
                                                  stderr=subprocess.STDOUT, start_new_session=True))
            os.killpg(processes[-1].pid, signal.SIGSTOP)
        turn = 0
        try:
            while len(found) < len(processes):
                if turn not in found:
                    os.killpg(processes[turn].pid, signal.SIGCONT)
                    found |= _wait(turn, processes[turn], seconds, started, folders[turn] / "log")
                    if turn not in found:
                        os.killpg(processes[turn].pid, signal.SIGSTOP)
                turn = 1 - turn
        finally:  # one failed, or we were interrupted: the other must not stay behind, stopped
            for process in processes:
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return [found[number] for number in range(len(processes))]


def _wait(turn: int, process: subprocess.Popen[bytes], seconds: float, started: float, log: Path) -> dict[int, common.Usage]:
    """What a process took if it ends within some seconds, else nothing."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"exit code {process.returncode}\n{log.read_text(errors='replace')[-2000:]}")
            return {turn: common.usage_of(usage, time.perf_counter() - started)}
        time.sleep(0.02)
    return {}


def _words(command: str, steps: int, folder: str) -> list[str]:
    return shlex.split(command.replace("{steps}", str(steps)).replace("{out}", os.path.join(folder, "out")))


def _figures(runs: dict[str, list[common.Usage]], short: int, long: int) -> dict[str, Any]:
    """Per step and start-up from pairs of a short and a long run, and the largest memory."""
    steps = long - short
    per_step = [(after.cpu - before.cpu) / steps for before, after in zip(runs["short"], runs["long"], strict=True)]
    wall = [(after.wall - before.wall) / steps for before, after in zip(runs["short"], runs["long"], strict=True)]
    start = [run.cpu - short * share for run, share in zip(runs["short"], per_step, strict=True)]
    return {"per_step": per_step, "wall_per_step": wall, "start_up": start, "peak_bytes": max(run.peak_bytes for run in runs["long"]), "runs": runs}


def _row(name: str, found: dict[str, Any], sliced: bool) -> tuple[str, ...]:
    """A line of the table; the clock says nothing of one command where two took turns."""
    step, wall, start = (common.spread(found[key]) for key in ("per_step", "wall_per_step", "start_up"))
    return (name, f"{step['median']:.3f}", f"{step['least']:.3f}-{step['most']:.3f}", f"{start['median']:.1f}",
            *(() if sliced else (f"{wall['median']:.3f}",)), common.gigabytes(found["peak_bytes"]))


def _tell(side: str, length: str, usage: common.Usage) -> None:
    print(f"{side} {length:5s} {usage.cpu:8.2f} CPU s {usage.wall:8.2f} s {common.gigabytes(usage.peak_bytes):>6s} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
