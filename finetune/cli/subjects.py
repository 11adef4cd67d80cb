"""Whose pictures a study learns from: the embedded world's held-out subjects, or a folder with a folder for each."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from finetune.cli.compare_settings import CompareSettings
from finetune.errors import Problem, nearest

CLASSES = ("classes.csv", "prompts_and_classes.txt")  # ours, and DreamBench's own file
USUAL = 5  # pictures of one of the embedded world's subjects


@dataclass(frozen=True)
class Whose:
    """One subject of a study: its name, its class noun, and its folder of pictures or, with `known`, none yet.

    `settings` are what else it needs: a style's class pictures are asked for in other words than a thing's.
    """

    name: str
    noun: str
    folder: Path | None
    known: bool = False
    settings: dict[str, str] = field(default_factory=dict)


def subjects(settings: CompareSettings, family: str) -> list[Whose]:
    """The subjects that --subjects names; the one of --instance-dir where it names none.

    Raises:
        Problem: nobody of that name, a folder without folders, or a class noun that nobody told.
    """
    asked = (settings.subjects or "").strip()
    if not asked:
        folder = None if settings.instance_dir is None else Path(settings.instance_dir)
        return [Whose((settings.class_noun or "subject").replace(" ", "-"), settings.class_noun or "", folder)]
    if settings.instance_dir is not None or settings.dataset is not None:
        raise Problem("Both --subjects and one subject's pictures are given.", "Each subject brings its own pictures.",
                      "Leave out --instance-dir and --dataset, or --subjects.")
    if Path(asked).is_dir():
        return folders(Path(asked), settings.class_noun)
    if family != "toybox":
        raise Problem(f"--subjects {asked} is not a folder.", "Numbers and names mean the embedded world's subjects, which only --model toybox draws.",
                      "Name a folder that holds one folder of pictures for each subject.")
    return embedded(asked)


def embedded(asked: str) -> list[Whose]:
    """The first N of the embedded world's held-out subjects, or those, and held-out styles, of the given names."""
    from finetune.toybox.styles import NOUN, STYLES_HELD_OUT
    from finetune.toybox.subjects import SUBJECTS

    nouns = {**{name: one.noun for name, one in SUBJECTS.items()}, **dict.fromkeys(STYLES_HELD_OUT, NOUN)}

    if asked.isdigit():
        if not 1 <= int(asked) <= len(SUBJECTS):
            raise Problem(f"--subjects {asked} is impossible.", f"The embedded world has {len(SUBJECTS)} held-out subjects.",
                          f"Give a number from 1 to {len(SUBJECTS)}.")
        names = list(SUBJECTS)[: int(asked)]
    else:
        names = [word for part in asked.split(",") if (word := part.strip())]
    for name in names:
        if name not in nouns:
            raise Problem(f"--subjects: there is no subject and no folder {name!r}.", nearest(name, nouns) or f"Known are {', '.join(nouns)}.",
                          "Give a number, names with commas, or a folder.")
        if names.count(name) > 1:
            raise Problem(f"--subjects names {name!r} twice.", "Each subject has a folder of its own name.", "Name it once.")
    prompts = {"class_prompt": f"a {NOUN}"}
    return [Whose(name, nouns[name], None, True, prompts if name in STYLES_HELD_OUT else {}) for name in names]


def folders(root: Path, given: str | None) -> list[Whose]:
    """One subject for each folder in a folder; nouns from its table of classes, from --class-noun, or from their names.

    Raises:
        Problem: there is no folder in it, or a name does not say the class.
    """
    places = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not places:
        raise Problem(f"--subjects {root} holds no folders.", "Each subject has a folder of pictures of its own.",
                      f"For the pictures of one subject write --instance-dir {root}.")
    told = classes(root)
    found, doubtful = [], []
    for place in places:
        noun = told.get(place.name) or given or re.sub(r"\d+$", "", place.name)
        if place.name not in told and not given and not re.fullmatch(r"[^\W\d_]+", noun):
            doubtful.append(place.name)
        found.append(Whose(place.name, noun, place))
    if doubtful:
        raise Problem(f"The class noun of {', '.join(doubtful)} cannot be told from the folder's name.", "Only names such as dog or dog6 say it.",
                      f"Write {root / CLASSES[0]} with one line for each: {doubtful[0]},NOUN")
    return found


def classes(root: Path) -> dict[str, str]:
    """Class noun by subject, from `subject,class` lines; DreamBench's list of the same, with prompts below it, as well."""
    path = next((root / name for name in CLASSES if (root / name).is_file()), None)
    if path is None:
        return {}
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if line.strip() == "Prompts":
            break
        subject, comma, noun = (part.strip() for part in line.partition(","))
        if comma and noun and noun != "class":
            found[subject] = noun
    return found


def bring(whose: Whose, output: Path, count: int | None) -> Path | None:
    """The folder with a subject's pictures; those of the embedded world are drawn into OUT/pictures/NAME."""
    if not whose.known:
        return whose.folder
    from finetune.toybox import styles
    from finetune.toybox.subjects import SUBJECTS, save_references

    target = output / "pictures" / whose.name
    if len(list(target.glob("*.png"))) != (count or USUAL):
        shutil.rmtree(target, ignore_errors=True)
        if whose.name in styles.STYLES_HELD_OUT:
            styles.save_references(styles.STYLES_HELD_OUT[whose.name], target, count or USUAL)
        else:
            save_references(SUBJECTS[whose.name], target, count or USUAL)
    return target
