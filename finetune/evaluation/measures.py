"""What is measured on one row of pictures: features and readings in, per-cluster means of each metric out.

A cluster is a prompt, or a seed where a kind has a single prompt; the same clusters in the same order for every row.
Shapes: N pictures of a row, C clusters, K real pictures, T true pictures of a prompt, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from finetune import runs
from finetune.data.picture import Unreadable, cut, decode
from finetune.errors import Problem
from finetune.evaluation import copies, kernel, scores, statistics
from finetune.evaluation.judge import Judge
from finetune.evaluation.suites import Shot, Suite
from finetune.evaluation.truth import Truth

MAX_PIXELS = 100_000_000
TRUTHS = 8
TRUE_SEED, ORACLE_SEED = 11, 12  # of the pictures rows are compared with, and of the row of true pictures
READ = {"subject": "asked", "other": "kept"}
ORACLE = "oracle"


@dataclass
class Seen:
    """One row of pictures through every eye; rows of arrays are N pictures in the order of `shots`.

    `asked` and `read` are attributes by kind, empty where there is no truth to ask.
    """

    row: str
    title: str
    place: str
    shots: list[Shot]
    clip: np.ndarray
    encoder: np.ndarray
    layout: np.ndarray
    asked: list[dict[str, str]] = field(default_factory=list)
    read: list[dict[str, str]] = field(default_factory=list)

    def of(self, kind: str) -> np.ndarray:
        """Positions of the pictures of one kind."""
        return np.array([place for place, shot in enumerate(self.shots) if shot.kind == kind], dtype=int)

    def clusters(self, kind: str) -> list[int]:
        """What each picture of a kind is counted under: its prompt, or its seed where there is a single prompt."""
        shots = [shot for shot in self.shots if shot.kind == kind]
        one = len({shot.place for shot in shots}) == 1
        return [shot.turn if one else shot.place for shot in shots]

    def labels(self, kind: str, suite: Suite) -> list[str]:
        """The clusters in words: the prompt's template, or "seed k" where there is a single prompt."""
        shots = [shot for shot in self.shots if shot.kind == kind]
        texts = {"subject": suite.subject, "class": suite.bare, "other": suite.other}[kind]
        one = len({shot.place for shot in shots}) == 1
        return [f"{statistics.SEED}{shot.turn}" if one else texts[shot.place] for shot in shots]


@dataclass
class References:
    """The real pictures, (K, D) features each, and their layouts with variants (K, V, D)."""

    files: list[str]
    clip: np.ndarray
    encoder: np.ndarray
    layout: np.ndarray
    turned: np.ndarray


@dataclass
class Known:
    """True pictures of the subject for each subject prompt, by its plain text: T pictures, (T, D) features each."""

    subject: str
    clip: dict[str, np.ndarray]
    encoder: dict[str, np.ndarray]


Values = dict[str, tuple[list[str], np.ndarray]]


def see_references(files: Sequence[str], judge: Judge) -> References:
    """The real pictures: upright, RGB, the square in the middle.

    Raises:
        Problem: there are none, or one cannot be read.
    """
    pictures = []
    for file in files:
        try:
            picture = decode(Path(file), MAX_PIXELS)[0]
        except Unreadable as error:
            raise Problem(f"The real picture {file} cannot be read.", f"{error}.",
                          "Put it back, or correct instance_files in comparison.json.") from error
        pictures.append(cut(picture, min(picture.size), (0.5, 0.5)))
    if not pictures:
        raise Problem("The comparison names no real pictures.", "Fidelity is similarity to them.", "Give instance_files in comparison.json.")
    return References(list(files), judge.clip_images(pictures), judge.encode(pictures), copies.layouts(pictures), copies.variants(pictures))


def see(judge: Judge, truth: Truth | None, row: str, title: str, place: str, shots: list[Shot], pictures: list[Image.Image]) -> Seen:
    """One row of pictures through every eye."""
    asked = [truth.parse(shot.plain) for shot in shots] if truth else []
    return Seen(row, title, place, shots, judge.clip_images(pictures), judge.encode(pictures), copies.layouts(pictures),
                asked, truth.read(pictures) if truth else [])


def see_truth(judge: Judge, truth: Truth, subject: str, suite: Suite, folder: Path) -> tuple[Known, Seen]:
    """True pictures of the subject for every subject prompt, and a row of others of them: the ceiling.

    The row has as many pictures a prompt as the suite asks, from seeds of its own, so that nothing is compared with itself.
    They are left in FOLDER/oracle/images, where people can see what was asked for.
    """
    shots = [shot for shot in suite.shots(suite.class_noun, 0) if shot.kind == "subject"]
    prompts = list(dict.fromkeys(shot.plain for shot in shots))
    drawn = [truth.true_pictures(prompt, subject, TRUTHS, TRUE_SEED) for prompt in prompts]
    flat = [picture for pictures in drawn for picture in pictures]
    clip, encoder = (features.reshape(len(prompts), TRUTHS, -1) for features in (judge.clip_images(flat), judge.encode(flat)))
    known = Known(subject, dict(zip(prompts, clip, strict=True)), dict(zip(prompts, encoder, strict=True)))
    turns = suite.seeds["subject"]
    ceiling = [picture for prompt in prompts for picture in truth.true_pictures(prompt, subject, turns, ORACLE_SEED)]
    for shot, picture in zip(shots, ceiling, strict=True):
        with runs.atomic_path(folder / ORACLE / "images" / shot.file) as temporary:
            picture.save(temporary)
    return known, see(judge, truth, ORACLE, "The true subject, drawn", ORACLE, shots, ceiling)


def measure(row: Seen, base: Seen | None, references: References, texts: Mapping[str, np.ndarray], suite: Suite,
            known: Known | None = None) -> Values:
    """Each metric of a row: labels of its clusters and means per cluster, (C,), or (C, K) where the real pictures are a second factor.

    Args:
        base: the untouched base's row; None for a row that has subject pictures alone (the true subject).
        texts: CLIP features of each plain text.
        known: the truth about the subject, where it is known.
    """
    found: Values = {}

    def add(key: str, kind: str, values: np.ndarray) -> None:
        labels = row.labels(kind, suite)
        there = ~np.isnan(values.reshape(len(values), -1)[:, 0])
        if there.any():
            labels = [label for label, one in zip(labels, there, strict=True) if one]
            found[key] = (list(dict.fromkeys(labels)), statistics.cluster_means(values[there], labels))

    subject = row.of("subject")
    plain = [row.shots[place].plain for place in subject]
    add("clip_i", "subject", scores.fidelity(row.clip[subject], references.clip))
    add("dino", "subject", scores.fidelity(row.encoder[subject], references.encoder))
    add("clip_t", "subject", scores.text_agreement(row.clip[subject], np.stack([texts[text] for text in plain])))
    for kind, key in READ.items():
        places = row.of(kind)
        if row.read and len(places):
            add(key, kind, scores.attributes_right([row.asked[place] for place in places], [row.read[place] for place in places]))
    if base is not None:
        bare, other = row.of("class"), row.of("other")
        add("drift", "class", scores.drift(row.encoder[bare], base.encoder[bare]))
        add("other_drift", "other", scores.drift(row.encoder[other], base.encoder[other]))
        if suite.name == "dreambench":
            add("pres", "class", scores.fidelity(row.encoder[bare], references.encoder))
        add("leak", "class", scores.leak(row.encoder[bare], base.encoder[bare], references.encoder))
    variety = scores.diversity(row.encoder[subject], row.clusters("subject"))
    if len(variety):
        found["diversity"] = (list(dict.fromkeys(row.labels("subject", suite))), variety)
    add("copy", "subject", scores.nearest(copies.likeness(row.layout[subject], references.turned))[1])
    if known is not None:
        add("oracle", "subject", truth_likeness(row, subject, known))
        if len(subject) > 1:
            truths = np.concatenate([known.clip[text] for text in dict.fromkeys(plain)])
            add("kid", "subject", kernel.contributions(row.clip[subject], truths))
    return found


def truth_likeness(row: Seen, places: np.ndarray, known: Known) -> np.ndarray:
    """Mean cosine to the true pictures of the same prompt, (N,), averaged over both encoders.

    The encoder of individuals hardly sees the place, CLIP hardly the individual; told by one of them a picture of the right thing
    in the wrong place, or of the wrong thing in the right one, would pass.
    """
    plain = [row.shots[place].plain for place in places]
    return (scores.closeness(row.encoder[places], np.stack([known.encoder[text] for text in plain]))
            + scores.closeness(row.clip[places], np.stack([known.clip[text] for text in plain]))) / 2
