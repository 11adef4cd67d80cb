"""One cell of a comparison: one subject, one training seed, all rows. A comparison of one subject is a single cell."""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune import runs
from finetune.cli import quiet
from finetune.cli.compare_settings import CompareSettings
from finetune.cli.evaluate import judge_of, sampler_of, suite_of_settings
from finetune.cli.rows import Row, plan, recipe_text, same
from finetune.errors import Problem
from finetune.model import family_of


@dataclass
class Cell:
    """What is trained on one subject with one seed, and how far it is.

    Attributes:
        settings: of this cell alone: class noun, pictures, training seed and folder are its own.
        evaluation_seed: seed of the evaluation's pictures, common to all cells of a study.
        subject: what the study calls the subject. `known`: whether it is one of the embedded world's.
        pictures: absolute path and hash of every picture.
        extra: more for comparison.json: budget, workers.
        finished, failed: rows that were trained, and rows that could not be, with the reason.
    """

    settings: CompareSettings
    family: str
    rows: list[Row]
    pictures: list[dict[str, str]]
    evaluation_seed: int
    subject: str = ""
    known: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    finished: list[Row] = field(default_factory=list)
    failed: list[tuple[Row, str]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.settings.output

    @property
    def name(self) -> str:
        return self.settings.output.name

    def file(self) -> dict[str, Any]:
        """comparison.json of what is finished: what evaluation and report start from."""
        manifest = runs.read_json(self.folder / self.finished[0].name / "manifest.json")
        kept = {row.name for row in self.finished}
        return {
            "model": self.settings.model, "family": self.family, "model_hash": manifest["model"]["hash"],
            "class_noun": self.settings.class_noun, "instance_files": [one["path"] for one in self.pictures],
            **({"subject_name": self.subject} if self.known else {}),
            "rows": [{"row": row.name, "title": row.title, "method": row.method, "run": row.name, "subject": row.subject}
                     for row in self.rows if row.name in kept],
            "failed": [{"row": row.name, "title": row.title, "method": row.method, "error": trouble} for row, trouble in self.failed],
            "seed": self.evaluation_seed, "training_seed": self.settings.seed, "device": self.settings.device,
            "suite": suite_of_settings(self.settings), "judge": judge_of(self.settings),
            "sampler": sampler_of(self.settings, self.family), **self.extra,
        }

    def write(self) -> None:
        """Write comparison.json when there is anything to say; an unchanged one is left alone."""
        path = self.folder / "comparison.json"
        if self.finished:
            told = self.file()
            if not path.is_file() or runs.read_json(path) != told:
                runs.write_json(path, told)

    def note(self, row: Row, trouble: str | None) -> None:
        """A row is done, well or not."""
        if trouble:
            self.failed.append((row, trouble))
        else:
            self.finished.append(row)
        self.write()


def build(settings: CompareSettings, family: str, *, evaluation_seed: int | None = None, subject: str = "", known: bool = False) -> Cell:
    """Plan the rows of a cell and look at its pictures.

    Raises:
        Problem: no class noun, an impossible row, or no picture that can be used.
    """
    if not settings.class_noun:
        raise Problem("No class noun was given.", "The base, which has never seen the subject, is asked for the plain word.",
                      "Add --class-noun dog (or backpack, watercolor, ...).")
    rows = plan(settings, family_of)
    return Cell(settings, family, rows, pictures_of(rows[0], settings.output), settings.seed if evaluation_seed is None else evaluation_seed,
                subject or settings.class_noun, known)


def pictures_of(row: Row, output: Path) -> list[dict[str, str]]:
    """Absolute path and hash of every picture; those of a data set are written to OUT/pictures first.

    Raises:
        Problem: no picture can be used.
    """
    from finetune.data import intake

    found = []
    for number, picture in enumerate(intake(row.settings).pictures):
        path = picture.path
        if path is None:
            path = output / "pictures" / f"{number:03d}.png"
            with runs.atomic_path(path) as temporary:
                picture.load().save(temporary)
        found.append({"path": str(Path(path).resolve()), "sha256": picture.sha256})
    return found


def first_pictures(settings: CompareSettings, target: Path) -> CompareSettings:
    """With --pictures N: the first N pictures and their captions into a folder of the comparison, which is then learned from.

    Raises:
        Problem: there are fewer, or they are in a data set.
    """
    from finetune.data.captions import SUFFIXES, TABLES
    from finetune.data.intake import scan

    if not settings.pictures:
        return settings
    if settings.instance_dir is None:
        raise Problem(f"--pictures {settings.pictures} takes the first pictures of a folder.", "There is no --instance-dir.",
                      f"For a data set write --dataset-split 'train[:{settings.pictures}]'.")
    source = Path(settings.instance_dir)
    found = [picture.path for picture in scan(source, settings.max_pixels, captions=False).pictures if picture.path]
    if len(found) < settings.pictures:
        raise Problem(f"--pictures {settings.pictures} is more than {source} has.", f"It has {len(found)} that can be read.",
                      f"Give --pictures {len(found)} or fewer.")
    chosen = found[: settings.pictures]
    beside = [path.with_suffix(suffix) for path in chosen for suffix in SUFFIXES] + [source / name for name in TABLES]
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in [*chosen, *(path for path in beside if path.is_file())]:
        shutil.copy2(path, target / path.name)
    return changed(settings, instance_dir=target, pictures=None)


def changed(settings: CompareSettings, **values: Any) -> CompareSettings:
    """The settings with other values; what was never given stays so, which the rows' own defaults depend on."""
    given = {key: getattr(settings, key) for key in settings.model_fields_set}
    return type(settings)(**{**given, **values})


def todos(cell: Cell) -> dict[str, str | None]:
    """What each row needs: None (finished), "--resume", "--overwrite" or "" (never begun)."""
    found: dict[str, str | None] = {}
    for row in cell.rows:
        folder = cell.folder / row.name
        if not (folder / "settings.json").is_file():
            found[row.name] = "--overwrite" if folder.is_dir() else ""
            continue
        manifest = runs.read_json(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
        kept = not cell.settings.overwrite and same(row, runs.read_json(folder / "settings.json"))
        kept = kept and [one["sha256"] for one in manifest.get("pictures", [])] == [one["sha256"] for one in cell.pictures]
        kept = kept and manifest.get("model", {}).get("hash") == hash_of(cell.settings.model)
        if kept and manifest.get("status") == "finished":
            found[row.name] = None
        else:
            found[row.name] = "--resume" if kept and runs.checkpoints(folder) else "--overwrite"
    return found


@functools.cache
def hash_of(model: str) -> str:
    """Hash of the base as the runs' manifests hold it."""
    from finetune.model import load

    quiet.libraries()
    return load(model).hash


def recipe(cell: Cell, row: Row) -> Path:
    """Write the row's recipe and return its path."""
    path = cell.folder.resolve() / "recipes" / f"{row.name}.toml"
    runs.write_text(path, recipe_text(row))
    return path


def share_base(source: Cell, target: Cell) -> None:
    """The untouched base's pictures of one cell for another of the same class noun: they depend on no training seed.

    The index tells from what each picture came, so the evaluation takes only those that are the same.
    """
    here, there = source.folder / "base" / "images", target.folder / "base" / "images"
    if there.is_dir() or not (here / "images.json").is_file():
        return
    there.mkdir(parents=True)
    for path in sorted(here.iterdir(), key=lambda path: path.name == "images.json"):  # the index last
        try:
            os.link(path, there / path.name)
        except OSError:
            shutil.copy2(path, there / path.name)
