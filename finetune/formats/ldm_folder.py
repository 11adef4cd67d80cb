"""A checkpoint written as a diffusers folder, weights streamed, configurations and tokenizer taken from a folder that describes it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from finetune.errors import Problem
from finetune.formats import stream
from finetune.formats.folder import finish_diffusers_folder
from finetune.formats.ldm import Checkpoint
from finetune.formats.ldm_shapes import shapes_of
from finetune.formats.ldm_text import TEXT_LEVEL
from finetune.runs import atomic_folder, read_json, write_json

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
SMALL = (".json", ".txt")
WHOLE = ("feature_extractor", "image_encoder", "depth_estimator")  # carried along as they are; a safety checker is not


def write(folder: Path | str, checkpoint: Checkpoint, like: Path | str, dtype: str | None, metadata: Mapping[str, str]) -> None:
    """Write FOLDER whole or not at all.

    Args:
        like: a diffusers folder whose configurations, scheduler and tokenizer fit the weights (weights in it are not read).
        dtype: "F16", "F32", "BF16", or None for what the weights have.
        metadata: of our own, for finetune.json; empty for none.

    Raises:
        Problem: the configurations are those of another model.
    """
    folder, like = Path(folder), Path(like)
    configs = {name: read_json(like / name / "config.json") for name in checkpoint.parts if (like / name / "config.json").is_file()}
    _check(checkpoint, configs, like)
    if folder.exists() and any(folder.iterdir()):
        raise Problem(f"{folder} is there already and not empty.", "Its files would be mixed up with the new ones.", "Choose another --output.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as fresh:
        for entry in sorted(like.iterdir()):
            if entry.is_dir() and entry.name in WHOLE:
                shutil.copytree(entry, fresh / entry.name)
            elif entry.is_dir() and (entry.name in checkpoint.parts or entry.name.startswith(("tokenizer", "scheduler"))):
                (fresh / entry.name).mkdir()
                for file in sorted(entry.iterdir()):
                    if file.suffix in SMALL and not file.name.endswith(".index.json"):
                        shutil.copyfile(file, fresh / entry.name / file.name)
        for name, part in checkpoint.parts.items():
            level = TEXT_LEVEL if name.startswith("text_encoder") else ""
            entries = {key if key.startswith("text_projection.") else level + key: entry.to(dtype or entry.dtype) for key, entry in part.items()}
            stream.save(fresh / name / f"{WEIGHTS[name]}.safetensors", entries, {"format": "pt"})
        write_json(fresh / "model_index.json", _index(read_json(like / "model_index.json"), fresh))
        finish_diffusers_folder(fresh)
        if metadata:
            write_json(fresh / "finetune.json", dict(metadata))


def _index(index: dict, folder: Path) -> dict:
    """model_index.json with nothing in it that is not in the folder."""
    absent = {name for name, entry in index.items() if isinstance(entry, list) and not (folder / name).is_dir()}
    index = {name: [None, None] if name in absent else entry for name, entry in index.items()}
    return index | ({"requires_safety_checker": False} if "safety_checker" in absent else {})


def _check(checkpoint: Checkpoint, configs: dict, like: Path) -> None:
    missing = [name for name in checkpoint.parts if name not in configs]
    if missing:
        raise Problem(f"{like} does not describe this checkpoint: it has no {missing[0]}/config.json.", "It is a model of another family.",
                      "Give --like the folder of a model of the same family.")
    wanted = shapes_of(configs)
    for name, part in checkpoint.parts.items():
        found = {key: entry.shape for key, entry in part.items()}
        if found != wanted[name]:
            key = next(key for key in sorted({**wanted[name], **found}) if wanted[name].get(key) != found.get(key))
            raise Problem(f"{like} does not describe this checkpoint: {name} has {key} of shape {found.get(key, 'none')}, "
                          f"its configuration asks for {wanted[name].get(key, 'none')}.", "It is a model of another family or size.",
                          "Give --like the folder of a model of the same kind.")
