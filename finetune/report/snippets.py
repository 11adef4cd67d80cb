"""How to load each artifact: lines to copy, and which programs read which of its files.

What each program reads was established by running or reading its loader; docs/formats.md ("How this was established") says which.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field

from finetune.report import words
from finetune.report.read import Comparison, Row, dig

@dataclass(frozen=True)
class Loading:
    """How to use one row's artifact: copyable snippets as (where, code), and the programs as (name, how)."""

    row: str
    title: str
    snippets: list[tuple[str, str]]
    programs: list[tuple[str, str]] = field(default_factory=list)


def loadings(comparison: Comparison) -> list[Loading]:
    """One for each run that left an artifact."""
    return [_loading(comparison, row) for row in comparison.methods if row.manifest]


def _loading(comparison: Comparison, row: Row) -> Loading:
    place = f"{comparison.folder.resolve().name}/{row.row}/artifact"
    subject = row.subject or dig(row.manifest, "artifact.trigger") or comparison.info.get("class_noun") or "subject"
    prompt = f"a photo of {words.article(subject)} in the snow"
    base = comparison.info.get("model", "toybox")
    model = "" if base == "toybox" else f"--model {shlex.quote(base)} "
    snippets = [("finetune", f"finetune generate {model}--artifact {shlex.quote(place)} --prompt {_in_shell(prompt)} --seed 1")]
    python, programs = _BY_METHOD.get(row.method, _other)(comparison, row, place, prompt)
    if python:
        snippets.append(("Python", python))
    return Loading(row.row, row.title, snippets, programs)


def _dreambooth(comparison: Comparison, row: Row, place: str, prompt: str) -> tuple[str, list[tuple[str, str]]]:
    single = _file(row, ".safetensors", without=("/",))
    kind = _pipeline(comparison)
    code = f'from diffusers import {kind}\npipe = {kind}.from_pretrained({_text(place)})\n' + _render(prompt)
    programs = [("diffusers", "the folder is a complete pipeline")]
    if single:
        return code, [*programs, ("ComfyUI", f"`{single}` in models/checkpoints"),
                      ("AUTOMATIC1111, Forge", f"`{single}` in models/Stable-diffusion")]
    return code, [*programs, ("ComfyUI", "the folder in models/diffusers; node DiffusersLoader"),
                  ("AUTOMATIC1111, Forge", "read single checkpoint files only, not this folder")]


def _embedding(comparison: Comparison, row: Row, place: str, prompt: str) -> tuple[str, list[tuple[str, str]]]:
    trigger = dig(row.manifest, "artifact.trigger") or row.subject
    file = _file(row, ".safetensors", prefer="learned_embeds") or "learned_embeds.safetensors"
    second = _file(row, ".safetensors", prefer="learned_embeds_2")
    load = f'pipe.load_textual_inversion({_text(f"{place}/{file}")}, token={_text(trigger)})\n'
    if second:  # SDXL: a row for each of its text encoders
        load = "".join(f'pipe.load_textual_inversion({_text(f"{place}/{one}")}, token={_text(trigger)}, text_encoder=pipe.text_encoder{end}, tokenizer=pipe.tokenizer{end})\n'
                       for one, end in (("learned_embeds.safetensors", ""), (second, "_2")))
    code = _base(comparison) + load + _render(prompt)
    stem = (_file(row, ".safetensors", without=("learned_embeds",)) or _file(row, ".pt") or str(trigger)).rsplit(".", 1)[0]
    return code, [("diffusers", f"`{file}`"), ("AUTOMATIC1111, Forge", f"`{stem}.pt` in embeddings/; its name is the word: {stem}"),
                  ("ComfyUI", f"`{stem}.safetensors` in models/embeddings; write embedding:{stem}")]


def _lora(comparison: Comparison, row: Row, place: str, prompt: str) -> tuple[str, list[tuple[str, str]]]:
    peft = _file(row, ".safetensors", prefer="pytorch_lora_weights")
    if not peft:
        return "", [("PEFT", "the folder of each network, as PEFT's own adapter")]
    kohya = _file(row, ".safetensors", without=("pytorch_lora_weights",))
    code = _base(comparison) + f'pipe.load_lora_weights({_text(place)}, weight_name={_text(peft)})\n' + _render(prompt)
    programs = [("diffusers, PEFT", f"`{peft}`")]
    if kohya:
        stem = kohya.rsplit(".", 1)[0]
        programs += [("ComfyUI", f"`{kohya}` in models/loras; node Load LoRA"),
                     ("AUTOMATIC1111, Forge", f"`{kohya}` in models/Lora; write <lora:{stem}:1>")]
    return code, programs


def _hypernetwork(comparison: Comparison, row: Row, place: str, prompt: str) -> tuple[str, list[tuple[str, str]]]:
    file = _file(row, ".pt")
    stem = file.rsplit(".", 1)[0]
    name = comparison.info.get("model", "toybox")
    code = ("from finetune import methods, model\n"
            f'base = model.load({_text(name)})\n'
            f'methods.load_artifact(base, {_text(place)})\n'
            f'image = model.render(base, [{_text(prompt)}], seeds=[1])[0]')
    if not file:  # the web UIs' file is written exactly where they can express the wiring
        return code, [("finetune", "alone: other programs feed key and value only, and have no place for a query network")]
    return code, [("AUTOMATIC1111", f"`{file}` in models/hypernetworks; write <hypernet:{stem}:1>"),
                  ("ComfyUI", f"`{file}` in models/hypernetworks; node Hypernetwork Loader"),
                  ("Forge", "loads the file and does not apply it"), ("diffusers", "has no hypernetworks; use the lines above")]


def _other(comparison: Comparison, row: Row, place: str, prompt: str) -> tuple[str, list[tuple[str, str]]]:
    return "", []


_BY_METHOD = {"dreambooth": _dreambooth, "textual-inversion": _embedding, "lora": _lora, "hypernetwork": _hypernetwork}


def _base(comparison: Comparison) -> str:
    """The lines that load the untouched base with diffusers."""
    name = comparison.info.get("model", "toybox")
    kind = _pipeline(comparison)
    start = f"from diffusers import {kind}\n"
    if name == "toybox":
        return start + f"from finetune.model.families import TOYBOX\npipe = {kind}.from_pretrained(TOYBOX)\n"
    loader = "from_single_file" if str(name).endswith((".safetensors", ".ckpt")) else "from_pretrained"
    return start + f'pipe = {kind}.{loader}({_text(name)})\n'


def _pipeline(comparison: Comparison) -> str:
    """diffusers' class for the base's family."""
    return "StableDiffusionXLPipeline" if comparison.info.get("family") == "sdxl" else "StableDiffusionPipeline"


def _render(prompt: str) -> str:
    return f"image = pipe({_text(prompt)}).images[0]"


def _text(value: object) -> str:
    """A value as Python writes it, in double quotes: these lines are copied and run, and the value may be a stranger's."""
    return json.dumps(str(value))


def _in_shell(text: str) -> str:
    """A text as one word of a shell, in double quotes where nothing in it means anything there."""
    return f'"{text}"' if re.fullmatch(r"[\w .,:;<>()\[\]/+-]*", text) else shlex.quote(text)


def _file(row: Row, suffix: str, prefer: str = "", without: tuple[str, ...] = ()) -> str:
    """Name of the artifact's file with that suffix; the one that contains `prefer`, and none whose path contains `without`."""
    names = [str(entry.get("file", "")) for entry in dig(row.manifest, "artifact.files") or []]
    found = [name for name in names if name.endswith(suffix) and not any(part in name for part in without)]
    if prefer:
        return next((name for name in found if prefer in name), "")
    return found[0] if found else ""
