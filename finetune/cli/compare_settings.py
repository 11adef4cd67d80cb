"""What `finetune compare` and `finetune evaluate` take. The budget and the pictures are the training settings' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, create_model

from finetune.settings import RunSettings, TrainSettings, setting

# Passed on to every row as declared there.
SHARED = (
    "instance_dir", "dataset", "dataset_split", "image_column", "caption_column", "captions", "crop", "flip", "max_pixels",
    "class_noun", "subject", "instance_prompt", "class_prompt", "caption_dropout", "class_dir",
    "steps", "batch_size", "accumulate", "resolution", "gradient_checkpointing", "validate_every",
)


def reuse(tree: type[BaseModel], keys: tuple[str, ...]) -> dict[str, Any]:
    """Fields of another tree, to be declared here again without writing them twice."""
    return {key: (tree.model_fields[key].annotation, tree.model_fields[key]) for key in keys}


class EvaluationSettings(RunSettings):
    """How pictures are rendered and scored."""

    suite: str | None = setting(None, "set of evaluation prompts [default: the one for the base's family]", group="evaluation")
    evaluation_seeds: int | None = setting(
        None, "pictures of each evaluation prompt [default: the suite's]", unit="seeds", group="evaluation", ge=1)
    sampler_steps: int | None = setting(None, "sampler steps of evaluation pictures [default: 25 for toybox, else 30]",
                                        group="evaluation", ge=1)
    guidance: float | None = setting(None, "guidance scale of evaluation pictures [default: 4 for toybox, else 7.5]",
                                     group="evaluation", ge=0)
    judge: str | None = setting(
        None, "toybox, or a folder with clip/ and encoder/ [default: toybox on toybox, else --clip and --encoder]", group="evaluation")
    clip: str | None = setting(None, "CLIP that judges: a folder or hub id [default: the judge's]", group="evaluation")
    encoder: str | None = setting(
        None, "self-supervised image encoder that judges: a folder or hub id [default: the judge's]", group="evaluation")


Pictures = create_model("Pictures", __base__=EvaluationSettings, **reuse(TrainSettings, SHARED))


class CompareSettings(Pictures):  # type: ignore[valid-type, misc]
    """What `finetune compare` takes: pictures, budget, methods, evaluation."""

    METHOD: ClassVar[str] = "compare"

    methods: str = setting(
        "dreambooth,textual-inversion,lora,hypernetwork",
        "what to compare. hypernetwork stands for its two rows hypernetwork:key,value and hypernetwork:key,query; "
        "names of own [rows.NAME] tables of the recipe may be listed too", group="methods")
    placeholder: str | None = setting(None, "new word of Textual Inversion [default: '<my-NOUN>']", group="methods")
    rows: dict[str, dict[str, Any]] = setting(
        {}, "tables of settings for single rows, in a recipe: [rows.lora], then rank = 4", group="methods")
    output: Path = setting(Path("out"), "folder of the comparison; run again to go on where it stopped", group="run")
    overwrite: bool = setting(False, "train every row again, finished or not", group="run")
