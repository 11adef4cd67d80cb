"""The text of a model card: the hub's YAML head, then plain Markdown."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.cli.hub import Artifact

PIPELINES = {"sdxl": "StableDiffusionXLPipeline"}
MARKDOWN = str.maketrans({sign: "\\" + sign for sign in "\\`*_<>|[]#"})


def render(artifact: Artifact, repository: str, licence: str, tags: list[str], pictures: list[str], training: list[tuple[str, str]],
           scores: list[tuple[str, str, str]]) -> str:
    """The whole card."""
    told = artifact.told
    title = repository.partition("/")[2]
    trigger = str(told.get("trigger") or told.get("subject") or "")
    prompt = f"a photo of {trigger} in the snow"
    parts = [_head(artifact, licence, tags, pictures), f"# {_plain(title)}\n",
             f"{_plain(_what(artifact))}\n\nWrite {_code(trigger)} in the prompt where you mean it.\n"]
    if pictures:
        parts.append("\n".join(f"![{_plain(asked)}](samples/{number}.png)" for number, asked in enumerate(pictures, 1)) + "\n")
    parts.append("## How to load it\n\n" + "\n\n".join(f"**{name}**\n\n{text}" for name, text in loading(artifact, repository, trigger, prompt)) + "\n")
    parts.append("## Files\n\n| file | bytes | SHA-256 |\n|---|---|---|\n" + "\n".join(
        f"| {_plain(entry['file'])} | {entry['bytes']:,} | `{entry['sha256'][:16]}` |" for entry in artifact.files) + "\n")
    if training:
        parts.append("## Training\n\n| setting | value |\n|---|---|\n" + "\n".join(f"| {_plain(label)} | {_plain(value)} |" for label, value in training) + "\n")
    if scores:
        parts.append("## Measured\n\n| what | value | meaning |\n|---|---|---|\n" + "\n".join(
            f"| {_plain(name)} | {_plain(value)} | {_plain(about)} |" for name, value, about in scores) + "\n")
    parts.append("## Licence\n\n" + _licence(artifact, licence) + "\n")
    return "\n".join(parts)


def _head(artifact: Artifact, licence: str, tags: list[str], pictures: list[str]) -> str:
    """The hub's YAML. JSON is YAML, so every text is quoted as JSON quotes it."""
    fields: dict[str, object] = {"license": licence, "library_name": "diffusers", "pipeline_tag": "text-to-image",
                                 "tags": ["stable-diffusion", "text-to-image", "finetune", *tags]}
    if "/" in artifact.base:
        fields["base_model"] = artifact.base
    if trigger := artifact.told.get("trigger"):
        fields["instance_prompt"] = trigger
    if pictures:
        fields["widget"] = [{"text": asked, "output": {"url": f"samples/{number}.png"}} for number, asked in enumerate(pictures, 1)]
    return "---\n" + "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()) + "\n---\n"


def _what(artifact: Artifact) -> str:
    kinds = {"lora": "A LoRA", "dreambooth": "A whole model trained by DreamBooth", "textual-inversion": "A learned word (Textual Inversion)",
             "hypernetwork": "A hypernetwork"}
    told = artifact.told
    kind = kinds.get(told["method"], f"An artifact of {told['method']}")
    return f"{kind} that knows {told.get('subject') or told.get('trigger')}, {told.get('class_noun') or 'a subject'}. Base model: {artifact.base}."


def loading(artifact: Artifact, repository: str, trigger: str, prompt: str) -> list[tuple[str, str]]:
    """(program, Markdown) for each program that reads one of the files, and a sentence for those that cannot."""
    if artifact.family == "toybox":
        return [("finetune", _shell(f"hf download {repository} --local-dir artifact\nfinetune generate --artifact artifact --prompt {shlex.quote(prompt)}")),
                ("Other programs", "The base is finetune's small embedded model. The files have the layouts other programs read, but fit no model they have.")]
    method = artifact.told["method"]
    found = {"lora": _lora, "dreambooth": _dreambooth, "textual-inversion": _embedding, "hypernetwork": _hypernetwork}.get(method)
    ours = ("finetune", _shell(f'hf download {repository} --local-dir artifact\n'
                               f"finetune generate --model {shlex.quote(artifact.base)} --artifact artifact --prompt {shlex.quote(prompt)}"))
    return [*(found(artifact, repository, trigger, prompt) if found else []), ours]


def _pipeline(artifact: Artifact) -> str:
    return PIPELINES.get(artifact.family, "StableDiffusionPipeline")


def _lora(artifact: Artifact, repository: str, trigger: str, prompt: str) -> list[tuple[str, str]]:
    peft, kind = "pytorch_lora_weights.safetensors", _pipeline(artifact)
    kohya = artifact.file(".safetensors", without=(peft,))
    found = []
    if any(entry["file"] == peft for entry in artifact.files):
        found.append(("diffusers", _python(f'from diffusers import {kind}\n\npipe = {kind}.from_pretrained({artifact.base!r})\n'
                                           f'pipe.load_lora_weights({repository!r}, weight_name={peft!r})\nimage = pipe({prompt!r}).images[0]')))
    if kohya:
        stem = kohya.rpartition(".")[0]
        found += [("AUTOMATIC1111, Forge", f"Put `{kohya}` into `models/Lora` and write `{prompt} <lora:{stem}:1>`."),
                  ("ComfyUI", f"Put `{kohya}` into `models/loras` and use the Load LoRA node.")]
    return found


def _dreambooth(artifact: Artifact, repository: str, trigger: str, prompt: str) -> list[tuple[str, str]]:
    kind, single = _pipeline(artifact), artifact.file(".safetensors")
    found = [("diffusers", _python(f"from diffusers import {kind}\n\npipe = {kind}.from_pretrained({repository!r})\nimage = pipe({prompt!r}).images[0]"))]
    if single:
        beside = artifact.file(".yaml")
        also = f" together with `{beside}`" if beside else ""
        return [*found, ("AUTOMATIC1111, Forge", f"Put `{single}`{also} into `models/Stable-diffusion`."), ("ComfyUI", f"Put `{single}` into `models/checkpoints`.")]
    return [*found, ("AUTOMATIC1111, Forge, ComfyUI", "They want one file: `finetune export FOLDER --to single-file --output model.safetensors`.")]


def _embedding(artifact: Artifact, repository: str, trigger: str, prompt: str) -> list[tuple[str, str]]:
    kind, stem = _pipeline(artifact), artifact.file(".safetensors", without=("learned_embeds.safetensors", "learned_embeds_2.safetensors")).rpartition(".")[0]
    load = f"pipe.load_textual_inversion({repository!r}, weight_name='learned_embeds.safetensors')"
    if artifact.file("learned_embeds_2.safetensors"):
        load += (f"\npipe.load_textual_inversion({repository!r}, weight_name='learned_embeds_2.safetensors',"
                 "\n                            text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)")
    return [("diffusers", _python(f"from diffusers import {kind}\n\npipe = {kind}.from_pretrained({artifact.base!r})\n{load}\nimage = pipe({prompt!r}).images[0]")),
            ("AUTOMATIC1111, Forge", f"Put `{stem}.safetensors` into `embeddings` and write `{stem}`: the file's name is the word."),
            ("ComfyUI", f"Put `{stem}.safetensors` into `models/embeddings` and write `embedding:{stem}`.")]


def _hypernetwork(artifact: Artifact, repository: str, trigger: str, prompt: str) -> list[tuple[str, str]]:
    file = artifact.file(".pt")
    if not file:
        return [("AUTOMATIC1111, Forge, ComfyUI, diffusers", "Cannot load it: it transforms more than key and value.")]
    stem = file.rpartition(".")[0]
    return [("AUTOMATIC1111", f"Put `{file}` into `models/hypernetworks` and write `{prompt} <hypernet:{stem}:1>`."),
            ("ComfyUI", f"Put `{file}` into `models/hypernetworks` and use the Hypernetwork Loader node."),
            ("Forge, diffusers", "Forge reads the file and applies nothing; diffusers has no hypernetworks.")]


def _licence(artifact: Artifact, licence: str) -> str:
    if licence == "other":
        return "It was trained from the base named above, whose licence applies to it. Which that is, finetune does not know: look it up before you share this."
    return (f"It was trained from {_plain(artifact.base)}, a model of a family published under {licence}; that licence applies to what is made from it, "
            "with its limits of use. If your base was itself a fine-tuned model, look its licence up.")


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


def _shell(code: str) -> str:
    return f"```sh\n{code}\n```"


def _code(text: str) -> str:
    return "`" + text.replace("`", "'") + "`"


def _plain(text: str) -> str:
    """Text from a run in Markdown, where none of its signs may mean anything."""
    return str(text).replace("\n", " ").translate(MARKDOWN)
