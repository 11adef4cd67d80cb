"""`finetune evaluate OUT`: pictures, scores and report again, from what is on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune import __version__, runs
from finetune.cli import processes, quiet
from finetune.cli import report as report_verb
from finetune.cli.compare_settings import EvaluationSettings
from finetune.cli.generate import OTHERS, SAMPLING
from finetune.settings import setting

JUDGES = ("judge", "clip", "encoder")
STAMP = ".scored"


class Settings(EvaluationSettings):
    """What `finetune evaluate` takes. What is not given stays as the comparison had it."""

    folder: Path = setting(..., "output folder of `finetune compare`, of one subject or of a study", group="arguments")


def run(settings: Settings, console: Console) -> None:
    """Change what was asked for in comparison.json, then render what is missing, score and report; of a study, every cell."""
    report_verb.check_comparison(settings.folder)
    with processes.locked(settings.folder):
        whole(settings, console)


def whole(settings: Settings, console: Console) -> None:
    """The same in a folder that is ours."""
    comparison = change(settings, settings.folder)
    cells = comparison.get("cells")
    if not cells:
        judge_and_show(settings.folder, console)
        return
    from finetune import report
    from finetune.cli import study
    from finetune.evaluation.study import place

    for number, entry in enumerate(cells, 1):
        where = place(settings.folder, entry)
        report_verb.check_comparison(where)
        change(settings, where)
        console.rule(f"[{number}/{len(cells)}] {entry['name']}", style="dim")
        judge(where, console)
        report.write(where)
    study.conclude(settings.folder, console)


def change(settings: Settings, folder: Path) -> dict[str, Any]:
    """Write what was given into a folder's comparison.json; returns it."""
    comparison = runs.read_json(folder / "comparison.json")
    before = json.dumps(comparison)
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
    if json.dumps(comparison) != before:
        runs.write_json(folder / "comparison.json", comparison)
    return comparison


def judge_and_show(folder: Path, console: Console) -> None:
    """Render base and rows, score them, write the report, print the table."""
    console.rule("Evaluation", style="dim")
    judge(folder, console)
    report_verb.show(folder, console)


def judge(folder: Path, console: Console) -> None:
    """Render and score one comparison. Where artifacts were kept along the way, they are judged first."""
    from finetune import evaluation

    quiet.libraries()
    if any(folder.glob("*/steps/*/artifact")):
        from finetune.evaluation import curves

        curves.trace(folder, console)
    evaluation.render_comparison(folder, console)
    evaluation.score(folder)
    runs.write_text(folder / STAMP, stamp(folder))


def scored(folder: Path) -> bool:
    """Whether a comparison's scores are those of its artifacts, its pictures and its comparison.json."""
    return (folder / "scores.json").is_file() and (folder / STAMP).is_file() and (folder / STAMP).read_text(encoding="utf-8") == stamp(folder)


def stamp(folder: Path) -> str:
    """A hash over what scores depend on; artifact.json and images.json hold the hashes of their files."""
    places = [folder / "comparison.json", *sorted([*folder.glob("*/artifact/artifact.json"), *folder.glob("*/images/images.json")])]
    told = [__version__, *(f"{path.relative_to(folder).as_posix()} {runs.sha256(path)}" for path in places)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest() + "\n"


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
