"""The table of verbs: what `finetune --help` lists, and where each verb's settings and body live."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from finetune.errors import Problem, nearest


@dataclass(frozen=True)
class Verb:
    """One verb. Its module offers `Settings` (pydantic) and `run(settings, console)`, or `of_method(name)` giving both."""

    name: str
    summary: str
    panel: str
    module: str
    examples: tuple[str, ...] = ()

    def load(self) -> tuple[type[BaseModel], Callable[..., Any]]:
        """Import what the verb needs: its settings and its body."""
        module = importlib.import_module(self.module)
        if hasattr(module, "of_method"):
            return module.of_method(self.name)
        return module.Settings, module.run


ONE = "Teach with one method"
ALL = "Compare methods"
USE = "Use what came out"
BASE = "The embedded base"

EXAMPLES = {
    "dreambooth": ("finetune dreambooth --instance-dir photos/ --class-noun dog",),
    "textual-inversion": (
        'finetune textual-inversion --instance-dir photos/ --placeholder "<my-dog>" --initializer dog',),
    "lora": ("finetune lora --instance-dir photos/ --class-noun dog --rank 16",),
    "hypernetwork": ("finetune hypernetwork --instance-dir photos/ --class-noun dog",),
}

OTHERS = [
    Verb("compare", "Train several methods on the same pictures, draws and budget; score them; write the report.", ALL,
         "finetune.cli.compare",
         ("finetune compare --instance-dir photos/ --class-noun dog --output out/",
          "finetune compare --instance-dir photos/ --class-noun dog --methods lora,hypernetwork:key,query",
          "finetune compare --subjects 12 --seeds 3 --workers 2 --output study/",
          "finetune compare --subjects dreambooth/dataset/ --model sd15/ --budget seconds --seconds 600")),
    Verb("plan", "Say what a run will take before it: memory, time, disk; and what fits.", ALL, "finetune.cli.plan",
         ("finetune plan lora --model sd15 --resolution 512 --rank 16", "finetune plan all --model sdxl --memory-limit 16GB")),
    Verb("evaluate", "Render and score a comparison again from what is on disk.", ALL, "finetune.cli.evaluate",
         ("finetune evaluate out/",)),
    Verb("report", "Write a comparison's report again from what is on disk; several folders as one.", ALL, "finetune.cli.report",
         ("finetune report out/", "finetune report machine-1/ machine-2/ --output merged/")),
    Verb("generate", "Render prompts, with artifacts or none, from noise or from a picture.", USE, "finetune.cli.generate",
         ('finetune generate --artifact out/lora/artifact --prompt "a photo of sks dog in the snow" '
          "--seed 1 --count 4 --output pics/",
          'finetune generate --artifacts-dir out/ --prompt "a <lora:lora:0.8> photo of sks dog" --x strength=0,0.5,1',
          'finetune generate --init-image pic.png --mask mask.png --prompt "a red mug"',
          "finetune generate --like pics/01-1.png --sampler euler-a")),
    Verb("export", "Write a run, artifact or model as the file another program loads.", USE, "finetune.cli.export",
         ("finetune export out/lora --to webui --output loras/", "finetune export out/dreambooth --to single-file --output dog.safetensors")),
    Verb("convert", "Write a file of one program's layout in the layout of another.", USE, "finetune.cli.convert",
         ("finetune convert pytorch_lora_weights.safetensors --to kohya --output dog.safetensors",
          "finetune convert model.ckpt --to single-file --output model.safetensors")),
    Verb("inspect", "Say what a file is, who reads it, what would go wrong where, and what to do.", USE, "finetune.cli.inspect",
         ("finetune inspect out/lora/artifact", "finetune inspect downloaded.safetensors --check")),
    Verb("merge", "Make one LoRA of several, or fold them into a base.", USE, "finetune.cli.lora_merge",
         ("finetune merge toy.safetensors:0.8 style.safetensors:0.5 --output both.safetensors",
          "finetune merge toy.safetensors --into toybox --output toybox-toy/")),
    Verb("extract", "Take a LoRA out of a fine-tuned model and its base.", USE, "finetune.cli.lora_extract",
         ("finetune extract out/dreambooth --base toybox --rank 8 --output dog.safetensors",)),
    Verb("resize", "Change the rank of a LoRA.", USE, "finetune.cli.lora_resize",
         ("finetune resize big.safetensors --rank 4 --output small.safetensors",)),
    Verb("recipes", "List, show or copy the packaged recipes.", USE, "finetune.cli.recipes",
         ("finetune recipes", "finetune recipes show lora-toybox", "finetune recipes copy lora-toybox my.toml")),
    Verb("pretrain", "Build the embedded base and its judge from nothing.", BASE, "finetune.cli.pretrain",
         ("finetune pretrain toybox --work toybox-work/",)),
    Verb("toybox", "Render its world, measure it against its bars, make a variant of it.", BASE, "finetune.cli.toybox",
         ("finetune toybox render --list",
          "finetune toybox render --count 1000 --seed 7 --masks --depth --output data/",
          "finetune toybox render --subject lilac-cat --output cat/",
          "finetune toybox render --subject lilac-cat --oracle --sheet truth.png",
          "finetune toybox evaluate",
          "finetune toybox evaluate inpainting",
          "finetune toybox variant inpainting --output toybox-inpainting/",
          "finetune toybox variant v-prediction --output toybox-v/")),
]


def verbs() -> dict[str, Verb]:
    """All verbs by name: one for each registered method, then the others."""
    from finetune.methods import names

    trained = [Verb(name, f"{summary[:1].upper()}{summary[1:].rstrip('.')}.", ONE, "finetune.cli.train", EXAMPLES.get(name, ()))
               for name, summary in names().items()]
    return {verb.name: verb for verb in [*trained, *OTHERS]}


def find(name: str) -> Verb:
    """The verb of that name.

    Raises:
        Problem: there is none.
    """
    table = verbs()
    if name not in table:
        raise Problem(f"There is no command {name!r}.", nearest(name, table), "`finetune --help` lists the commands.")
    return table[name]
