"""`finetune generate --like PICTURE`: the settings a picture tells of, with the flags given beside them on top.

A picture comes from anybody. Of it only these things are taken: text that becomes a prompt, numbers, words of our own
tables, and paths whose content has the hash that the picture names. Nothing is downloaded on its word.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune.cli import png
from finetune.cli.generate_artifacts import Artifact, fingerprint, found_again
from finetune.errors import Problem

SAME = ("negative", "seed", "steps", "guidance", "sampler", "spacing", "karras", "clip_skip", "size", "precision", "model")
PICTURES = ("init_image", "mask", "depth", "depth_model")


@dataclass
class Like:
    """What was found.

    Attributes:
        values: settings to use where no flag says otherwise.
        artifacts: to use beside the prompt; named: those the prompt itself names, already found. None where flags decide.
    """

    values: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Artifact] | None = None
    named: list[Artifact] | None = None


def read(path: Path, given: set[str], folder: Path | None, console: Console) -> Like:
    """Settings from a picture.

    Args:
        given: settings that flags decide; what the picture says of those is not even looked at.
        folder: --artifacts-dir, where artifacts may lie that have moved.

    Raises:
        Problem: nothing to read, or something the picture needs is gone or has changed.
    """
    facts, text = png.read(path)
    if facts is None:
        return from_web_ui(path, text or "", given, console)
    like = Like({"prompt": [facts["prompt"]], "count": 1})
    like.values |= {key: facts[key] for key in SAME if facts.get(key) is not None and key not in given}
    if "model" in like.values:
        check_model(path, str(facts["model"]), str(facts["model_hash"]))
    if "init_image" not in given:
        like.values |= {key: again(facts[key], key) for key in PICTURES if facts.get(key) and key not in given}
        if facts.get("init_image") and "denoising_strength" not in given:
            like.values["denoising_strength"] = facts["denoising_strength"]
    else:
        like.values |= {key: again(facts[key], key) for key in ("depth", "depth_model") if facts.get(key) and key not in given}
    artifacts = facts["artifacts"]
    if "artifact" not in given:
        like.artifacts = [found_again(one, folder) for one in artifacts if one.get("origin") != "prompt"]
    if "prompt" not in given and "prompts_file" not in given:
        like.named = [found_again(one, folder) for one in artifacts if one.get("origin") == "prompt"]
    if facts.get("batch", 1) > 1:
        console.print("Note: that picture was rendered with others (--batch), so the last bit of a pixel may differ.", style="yellow", soft_wrap=True)
    return like


def from_web_ui(path: Path, text: str, given: set[str], console: Console) -> Like:
    """What the web UI's parameters say, and a note on what they say besides."""
    values, rest = png.parse(text)
    if "steps" not in values and not values["prompt"]:
        raise Problem(f"{path} does not say how it was made.", "Its parameters hold neither a prompt nor steps.", "Give the original PNG.")
    model = rest.pop("Model", None)
    if model and "model" not in given:
        console.print(f"Note: that picture was made with the model {model!r}; name it with --model to come nearer.", style="yellow", soft_wrap=True)
    for word in ("Sampler", "Schedule type"):
        if word in rest:
            console.print(f"Note: its {word.lower()} {rest.pop(word)!r} is not known here.", style="yellow", soft_wrap=True)
    if "denoising_strength" in values and "init_image" not in given:
        console.print("Note: it began from another picture, which it does not hold; add --init-image for that.", style="yellow", soft_wrap=True)
        del values["denoising_strength"]
    if rest:
        console.print(f"Note: not repeated: {', '.join(rest)}.", style="yellow", soft_wrap=True)
    console.print("Note: the web UI draws its noise otherwise, so the picture will be another one of the same kind.", style="yellow", soft_wrap=True)
    values["prompt"] = [values["prompt"]]
    return Like({key: value for key, value in values.items() if key not in given} | {"count": 1})


def again(told: Any, key: str) -> Path:
    """A picture (or the folder of a depth model) that a picture was made from, if it is there and the same.

    Raises:
        Problem: gone or changed.
    """
    flag = f"--{key.replace('_', '-')}"
    if not isinstance(told, dict) or not isinstance(told.get("path"), str):
        raise Problem(f"What that picture says of {flag} cannot be read.", "", f"Name it with {flag}.")
    path = Path(told["path"])
    if not (path.is_file() or path.is_dir()):
        raise Problem(f"What {flag} was for that picture is not at {path}.", "The picture holds its path and hash, not itself.", f"Name it with {flag}.")
    if fingerprint(path) != told.get("hash"):
        raise Problem(f"{path} is no longer what {flag} was for that picture.", "Its hash is another.", f"Name it with {flag}.")
    return path


def check_model(picture: Path, name: str, wanted: str) -> None:
    """Whether the model a picture names is on this machine and the same; found without the network, before weights load.

    Raises:
        Problem: not there, or another.
    """
    from finetune.model.base import weights_hash
    from finetune.model.families import locate

    try:
        with offline():
            found = weights_hash(locate(name))
    except Problem as problem:
        raise Problem(f"The model {name!r} of {picture} is not on this machine.", problem.what, "Name one with --model.") from None
    if found != wanted:
        raise Problem(f"The model {name!r} is not the one {picture} was made with.", f"Its weights hash to {found}, that picture's to {wanted}.",
                      "Name the right one with --model, or this one to render with it all the same.")


@contextmanager
def offline() -> Any:
    """Nothing is downloaded on the word of a picture."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
