"""What a picture says of how it was made: text inside the PNG, in the web UI's form and as JSON.

    parameters          what AUTOMATIC1111's web UI and its kin read: prompt, "Negative prompt: ...", then "Steps: 25, Sampler: ..."
    finetune.settings   the same and more as JSON; `finetune generate --like PICTURE` reads it

Text in a picture comes from whoever made the picture. It is parsed and never run; paths in it are believed only where
what lies there has the hash that stands beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune import runs
from finetune.errors import Problem
from finetune.model.schedulers import SAMPLERS

PARAMETERS, SETTINGS = "parameters", "finetune.settings"
SCHEDULES = {"karras": "Karras", "trailing": "SGM Uniform", "leading": "DDIM", "linspace": "Uniform"}  # ours -> the web UI's "Schedule type"
NEGATIVE = "Negative prompt:"
LONGEST = 2**20  # characters of text that are read; the web UI's are a few hundred
_FIELD = re.compile(r'\s*([\w][\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
HASHES = {"lora": "Lora hashes", "embedding": "TI hashes", "hypernet": "Hypernet hashes"}


def write(path: Path, picture: Any, facts: Mapping[str, Any], text: str | None = None) -> None:
    """Write a PNG whole or not at all, with `facts` as JSON and `text` (or the facts in the web UI's form) beside it."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(PARAMETERS, parameters(facts) if text is None else text)  # Pillow takes iTXt where Latin-1 does not do
    info.add_text(SETTINGS, json.dumps(facts, ensure_ascii=False))
    with runs.atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)


def parameters(facts: Mapping[str, Any]) -> str:
    """The facts of one picture as the web UI writes them; networks given by flags are added to the prompt as its tags."""
    lines = [tagged(facts["prompt"], facts["artifacts"])]
    if facts["negative"]:
        lines.append(f"{NEGATIVE} {facts['negative']}")
    schedule = SCHEDULES["karras"] if facts["karras"] else SCHEDULES.get(facts["spacing"] or facts["own_spacing"])
    fields: dict[str, Any] = {
        "Steps": facts["steps"], "Sampler": SAMPLERS[facts["sampler"]].title, "Schedule type": schedule, "CFG scale": f"{facts['guidance']:g}",
        "Seed": facts["seed"], "Size": facts["size"], "Model hash": facts["model_short"], "Model": model_name(facts["model"]),
        "Denoising strength": f"{facts['denoising_strength']:g}" if facts["init_image"] else None,
        "Clip skip": facts["clip_skip"] if facts["clip_skip"] > 1 else None}
    for kind, title in HASHES.items():
        fields[title] = ", ".join(f"{one['name']}: {one['short']}" for one in facts["artifacts"] if one["kind"] == kind) or None
    fields["Version"] = f"finetune {facts['finetune']}"
    lines.append(", ".join(f"{name}: {quoted(str(value))}" for name, value in fields.items() if value is not None))
    return "\n".join(lines)


def tagged(prompt: str, artifacts: list[Mapping[str, Any]]) -> str:
    """The prompt with `<lora:NAME:STRENGTH>` for each network that a flag asked for."""
    tags = []
    for one in artifacts:
        if one["origin"] == "flag" and one["kind"] in ("lora", "hypernet"):
            tags.append(f"<{one['kind']}:{one['name']}:{one['strength']:g}>")
    return " ".join([prompt, *tags])


def model_name(model: str) -> str:
    """A file's stem, a folder's name, or the word itself."""
    return Path(model).stem if model.endswith(".safetensors") else Path(model).name or model


def quoted(value: str) -> str:
    """In quotation marks where a comma, a colon or a line end would otherwise end the field."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:\n"') else value


def read(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The JSON and the parameters in a picture, None each where there is none. Only the text is read, no pixel.

    Raises:
        Problem: no picture, or nothing in it.
    """
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise Problem(f"There is no picture {path}.", "--like reads the text inside a PNG.", "Check the path.")
    try:
        with Image.open(path) as picture:
            told, text = picture.info.get(SETTINGS), picture.info.get(PARAMETERS)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise Problem(f"{path} cannot be read as a picture.", f"{str(error).splitlines()[0]}.", "Give a PNG of this program or of the web UI.") from None
    if not told and not text:
        raise Problem(f"{path} does not say how it was made.", "It has neither settings nor parameters in its text; many programs remove them.",
                      "Give the original PNG.")
    return checked(path, str(told)) if told else None, str(text)[:LONGEST] if text else None


def checked(path: Path, told: str) -> dict[str, Any]:
    """The settings as JSON, of the kinds they should have.

    Raises:
        Problem: not ours, or changed by hand into something else.
    """
    kinds: dict[str, Any] = {"prompt": str, "negative": str, "seed": int, "steps": int, "guidance": (int, float), "sampler": str, "karras": bool,
                             "size": str, "clip_skip": int, "model": str, "model_hash": str, "precision": str, "artifacts": list}
    try:
        facts = json.loads(told[:LONGEST])
    except (json.JSONDecodeError, RecursionError):
        facts = None
    if isinstance(facts, dict) and "sheet" in facts:
        raise Problem(f"{path} is a contact sheet.", "It is of many pictures.", "Give one of them to --like.")
    wrong = [key for key, kind in kinds.items() if not isinstance((facts or {}).get(key), kind)] if isinstance(facts, dict) else ["the whole"]
    artifacts = [] if wrong else facts["artifacts"]
    if any(not isinstance(one, dict) or not {"path", "name", "hash", "strength"} <= one.keys() for one in artifacts):
        wrong = ["artifacts"]
    if wrong:
        raise Problem(f"The settings in {path} cannot be read.", f"Not as this version writes it: {', '.join(wrong)}.",
                      "Give a picture of this version, or the settings as flags.")
    return facts


def parse(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The web UI's parameters: what is understood, by the names of our settings, and the fields that are not.

    The last line holds the fields; before it stands the prompt, and from the line that begins with "Negative prompt:"
    on the negative one.
    """
    *lines, last = text.strip().split("\n")
    fields = {match[1].strip(): unquoted(match[2]) for match in _FIELD.finditer(last)}
    if len(fields) < 3:  # the web UI's own rule: then the last line is prompt as well
        lines, fields = [*lines, last], {}
    place = next((number for number, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
    rest = [line.strip() for line in lines[place:]]
    negative = "\n".join(rest).removeprefix(NEGATIVE).strip()
    found: dict[str, Any] = {"prompt": "\n".join(line.strip() for line in lines[:place]).strip(), "negative": negative}
    for name, key, kind in (("Steps", "steps", int), ("Seed", "seed", int), ("CFG scale", "guidance", float), ("Clip skip", "clip_skip", int),
                            ("Denoising strength", "denoising_strength", float)):
        if name in fields:
            found |= number(fields, name, key, kind)
    if re.fullmatch(r"\d+x\d+", fields.get("Size", "")):
        found["size"] = fields.pop("Size")
    found |= sampler(fields)
    return found, {name: value for name, value in fields.items() if name not in ("Version", "Model hash", *HASHES.values())}


def number(fields: dict[str, str], name: str, key: str, kind: type) -> dict[str, Any]:
    """One field as a number, taken out of the fields where it is one."""
    try:
        value = kind(fields[name])
    except ValueError:
        return {}
    del fields[name]
    return {key: value}


def sampler(fields: dict[str, str]) -> dict[str, Any]:
    """The sampler and where its timesteps lie: "DPM++ 2M" with "Schedule type: Karras", or in old pictures "DPM++ 2M Karras"."""
    named, schedule = fields.get("Sampler", ""), fields.get("Schedule type", "")
    if named.endswith(" Karras"):
        named, schedule = named.removesuffix(" Karras"), "Karras"
    found: dict[str, Any] = {}
    name = next((name for name, one in SAMPLERS.items() if one.title.lower() == named.lower()), None)
    if name is None:
        return found
    del fields["Sampler"]
    found["sampler"] = name
    ours = next((word for word, title in SCHEDULES.items() if title == schedule), None)
    if ours == "karras" and SAMPLERS[name].karras:
        found["karras"] = True
    elif ours in SAMPLERS[name].spacings:
        found["spacing"] = ours
    elif schedule:
        return found
    fields.pop("Schedule type", None)
    return found


def unquoted(value: str) -> str:
    """A field's value without the quotation marks that `quoted` puts."""
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value))
        except json.JSONDecodeError:
            return value[1:-1]
    return value
