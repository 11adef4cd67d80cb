"""Start-up: CPU seconds of commands that only look, and of training before its first step; peers' imports beside it.

    python benchmarks/startup.py
    python benchmarks/startup.py --peer "diffusers lora=python train_dreambooth_lora.py ..." --until "Steps:"

A peer's command is stopped when its output shows --until, and what it has taken by then is read from /proc.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

METHODS = ("dreambooth", "textual-inversion", "lora", "hypernetwork")
IMPORTS = {"python": "pass", "torch": "import torch", "torch, diffusers": "import torch, diffusers",
           "what train_dreambooth_lora imports": "import accelerate, diffusers, peft, torch, transformers; from diffusers import UNet2DConditionModel, "
           "AutoencoderKL, StableDiffusionPipeline; from peft import LoraConfig; from transformers import AutoTokenizer, CLIPTextModel"}
# The command line itself, ended where the loop would begin.
TRAIN = """
import os, sys, time
import finetune.training.run as run
def stop(*arguments, **named):
    with open(os.environ["BENCHMARK_OUT"], "w") as file:
        file.write(str(time.process_time()))
    os._exit(0)
run.fit = stop
from finetune.cli import main
sys.argv = ["finetune", *sys.argv[1:]]
main()
"""


def main() -> None:
    found = common.parser("CPU seconds before anything happens.")
    common.add_model(found, "tiny")
    found.add_argument("--rounds", type=int, default=5, help="runs of each; the median is shown")
    found.add_argument("--methods", default=",".join(METHODS), help="split by commas")
    found.add_argument("--only", default="", help="only what has this in its name")
    found.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="another trainer; may be repeated")
    found.add_argument("--until", default="Steps:", help="what a peer's output shows when its first step begins")
    options = found.parse_args()
    rows: dict[str, list[float]] = {}
    work = [*_looking(options), *_training(options), *_importing()]
    work += [(name, lambda words=words: _until(words, options.until)) for name, words in (peer.split("=", 1) for peer in options.peer)]
    work = [(name, measure) for name, measure in work if options.only in name]
    for turn in range(options.rounds):
        for name, measure in work if turn % 2 == 0 else reversed(work):
            rows.setdefault(name, []).append(measure())
    results = {name: {**common.spread(rows[name]), "all": rows[name]} for name, _ in work}
    common.show("CPU seconds", ("", "median", "least-most"),
                [(name, f"{one['median']:.2f}", f"{one['least']:.2f}-{one['most']:.2f}") for name, one in results.items()])
    common.write({"size": options.size, "results": results}, options.json)


def _looking(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """Commands that read at most a header."""
    file = Path(options.model or common.model_folder(options.size, options.cache)) / "unet" / "diffusion_pytorch_model.safetensors"
    commands = {"finetune --help": ["--help"], "finetune lora --help": ["lora", "--help"], "finetune inspect FILE": ["inspect", str(file)]}
    return [(name, lambda words=words: common.child([sys.executable, "-m", "finetune", *words], env=_env()).cpu) for name, words in commands.items()]


def _training(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """Training commands up to their first step: pictures, base, encodings and kernels included."""
    values = common.settings_of(options)
    flags = ["--model", values["model"], "--instance-dir", str(values["instance_dir"]), "--class-noun", "dog", "--resolution", str(values["resolution"]),
             "--steps", "1", "--validate-every", "0"]

    def before_first(method: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            out, log = Path(folder) / "seconds", Path(folder) / "log"
            env = {**_env(), "BENCHMARK_OUT": str(out)}
            common.child([sys.executable, "-c", TRAIN, method, *flags, "--output", f"{folder}/run"], env=env, log=log)
            return float(out.read_text())

    return [(f"finetune {method}, to the first step", lambda method=method: before_first(method)) for method in options.methods.split(",")]


def _importing() -> list[tuple[str, Any]]:
    return [(f"imports: {name}", lambda code=code: common.child([sys.executable, "-c", code]).cpu) for name, code in IMPORTS.items()]


def _env() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(common.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def _until(command: str, sign: str) -> float:
    """CPU seconds of a command and its children that have ended, when its output first shows a sign."""
    with tempfile.TemporaryDirectory() as folder:
        words = shlex.split(command.replace("{out}", f"{folder}/out"))
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        assert process.stdout is not None
        seen = b""
        while sign.encode() not in seen:
            more = os.read(process.stdout.fileno(), 4096)
            if not more:
                raise SystemExit(f"{command} ended without {sign!r}:\n{seen[-2000:].decode(errors='replace')}")
            seen += more
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
