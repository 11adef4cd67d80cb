"""`finetune evaluate OUT`: pictures, scores and report again, from what is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from finetune import runs
from finetune.cli import quiet
from finetune.cli import report as report_verb
from finetune.cli.compare_settings import EvaluationSettings
from finetune.cli.generate import OTHERS, SAMPLING
from finetune.settings import setting

JUDGES = ("judge", "clip", "encoder")


class Settings(EvaluationSettings):
    """What `finetune evaluate` takes. What is not given stays as the comparison had it."""

    folder: Path = setting(..., "output folder of `finetune compare`", group="arguments")


def run(settings: Settings, console: Console) -> None:
    """Change what was asked for in comparison.json, then render what is missing, score and report."""
    report_verb.check_comparison(settings.folder)
    path = settings.folder / "comparison.json"
    comparison = runs.read_json(path)
    given = settings.model_fields_set
    for key in ("model", "seed", "device"):
        if key in given:
            comparison[key] = getattr(settings, key)
    if given & {"suite", "evaluation_seeds"}:
        comparison["suite"] = suite_of_settings(settings)
    for key, name in (("sampler_steps", "steps"), ("guidance", "guidance")):
        if key in given:
            comparison["sampler"][name] = getattr(settings, key)
    for key in JUDGES:
        if key in given:
            comparison["judge"][key] = getattr(settings, key)
    runs.write_json(path, comparison)
    judge_and_show(settings.folder, console)


def judge_and_show(folder: Path, console: Console) -> None:
    """Render base and rows, score them, write the report, print the table."""
    from finetune import evaluation

    quiet.libraries()
    console.rule("Evaluation", style="dim")
    evaluation.render_comparison(folder, console)
    evaluation.score(folder)
    report_verb.show(folder, console)


def check(settings: EvaluationSettings, family: str, class_noun: str) -> None:
    """Refuse an unknown suite or a judge that is not to be had, before anything trains."""
    from finetune import evaluation

    asked = suite_of_settings(settings)
    evaluation.suite(family, class_noun, asked["name"], seeds=asked.get("seeds"))
    quiet.libraries()
    evaluation.open_judge(family, settings.judge, settings.clip, settings.encoder)


def judge_of(settings: EvaluationSettings) -> dict[str, str]:
    """Which judges were asked for; empty means the family's own."""
    return {key: value for key in JUDGES if (value := getattr(settings, key)) is not None}


def suite_of_settings(settings: EvaluationSettings) -> dict[str, Any]:
    """The suite as comparison.json holds it: a name, and seeds by kind where a number was given."""
    seeds = settings.evaluation_seeds
    # Bare-class pictures show leaking, which varies much from seed to seed: twice as many.
    return {"name": settings.suite, **({"seeds": {"subject": seeds, "class": 2 * seeds}} if seeds else {})}


def sampler_of(settings: EvaluationSettings, family: str) -> dict[str, Any]:
    """Sampler steps and guidance: what was given, else what suits the family."""
    steps, guidance = SAMPLING.get(family, OTHERS)
    return {"steps": settings.sampler_steps or steps, "guidance": guidance if settings.guidance is None else settings.guidance}
