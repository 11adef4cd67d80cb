"""From a comparison folder to OUT/scores.json: pictures in, one table of means, intervals and paired differences out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune import runs
from finetune.data.picture import Unreadable, cut, decode
from finetune.errors import Problem
from finetune.evaluation import scores, statistics
from finetune.evaluation.images import BASE_ROW, comparison_rows, read_comparison, rendered_as
from finetune.evaluation.judge import Judge, open_judge
from finetune.evaluation.suites import Shot, suite_of

MAX_PIXELS = 100_000_000
ALPHA = 0.05
# Distances from the base are zero for the base itself by definition, so it is not compared with anyone.
FROM_BASE = ("drift", "other_drift")


@dataclass
class Seen:
    """One row of pictures through the judge's eyes; features of N pictures in the order of `shots`."""

    row: str
    title: str
    place: str
    shots: list[Shot]
    clip: np.ndarray
    encoder: np.ndarray

    def of(self, kind: str) -> np.ndarray:
        """Positions of the pictures of one kind."""
        return np.array([place for place, shot in enumerate(self.shots) if shot.kind == kind])

    def clusters(self, kind: str) -> list[int]:
        """What each picture of a kind is counted under: its prompt, or its seed where there is a single prompt."""
        shots = [shot for shot in self.shots if shot.kind == kind]
        one = len({shot.place for shot in shots}) == 1
        return [shot.turn if one else shot.place for shot in shots]


@dataclass
class References:
    """The real pictures, (K, D) features each."""

    files: list[str]
    clip: np.ndarray
    encoder: np.ndarray


def score(folder: Path, *, judge: str | None = None, clip: str | None = None, encoder: str | None = None,
          device: str | None = None) -> dict[str, Any]:
    """Score every rendered row of a comparison and write OUT/scores.json.

    Args:
        judge, clip, encoder, device: as for `open_judge`, over what comparison.json says.

    Returns:
        What was written: judge, suite, columns, rows (base first, real pictures last) and pairs.

    Raises:
        Problem: no comparison, no judge, pictures missing, or a real picture that cannot be read.
    """
    from finetune.model.base import pick_device

    folder = Path(folder)
    comparison = read_comparison(folder)
    asked, seed = suite_of(comparison), comparison.get("seed", 0)
    rows = [row for row in comparison_rows(folder, comparison) if row[0] == BASE_ROW or (row[3] / "artifact").is_dir()]
    planned = [(name, title, place, asked.shots(subject, seed)) for name, title, subject, place in rows]
    _all_there(planned)
    given = {"judge": judge, "clip": clip, "encoder": encoder}
    wanted = {**(comparison.get("judge") or {}), **{key: value for key, value in given.items() if value}}
    where = pick_device(device or comparison.get("device", "auto"))
    eyes = open_judge(comparison["family"], wanted.get("judge"), wanted.get("clip"), wanted.get("encoder"), where)
    references = _references(comparison["instance_files"], eyes)
    seen = [_look(eyes, name, title, place, folder, shots) for name, title, place, shots in planned]
    plain = sorted({shot.plain for row in seen for shot in row.shots})
    texts = dict(zip(plain, eyes.clip_texts(plain), strict=True))

    values = {row.row: measure(row, seen[0], references, texts) for row in seen}
    result = {
        "judge": eyes.describe(), "suite": asked.describe(), "columns": columns(eyes),
        "rows": [_row(row, values[row.row], references, texts, seed) for row in seen] + [_real(references, seed)],
        "pairs": paired(values, seed),
    }
    runs.write_json(folder / "scores.json", result)
    return result


def columns(judge: Judge) -> list[dict[str, str]]:
    """The score columns: key, title (with the encoder's name where the value is usually quoted), direction, one sentence."""
    rows = [
        ("clip_i", f"CLIP-I ({judge.clip_title})", "higher", "Mean CLIP similarity of pictures of the subject to the real pictures."),
        ("dino", judge.encoder_title, "higher", "Mean similarity of pictures of the subject to the real pictures, by the image encoder."),
        ("clip_t", f"CLIP-T ({judge.clip_title})", "higher",
         "Similarity of pictures of the subject to their prompt, with the class noun in place of the trained word."),
        ("drift", "Drift", "lower", "1 - similarity to the untouched base's picture of the same prompt and seed, on the bare class noun."),
        ("other_drift", "Other drift", "lower", "The same on prompts about other things, which training should not touch."),
        ("leak", "Leak", "lower", "How much nearer to the real pictures the bare class noun's pictures came, compared with the base."),
        ("diversity", "Diversity", "higher", "Mean of 1 - similarity between pictures of the same prompt."),
        ("copy", "Copy", "lower", "Mean similarity to the nearest real picture; above the real pictures' own value it is copying."),
    ]
    return [dict(zip(("key", "title", "better", "help"), row, strict=True)) for row in rows]


def measure(row: Seen, base: Seen, references: References, texts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each metric of a row per cluster: (C,), or (C, K) where the real pictures are a second factor."""
    subject, bare, other = (row.of(kind) for kind in ("subject", "class", "other"))
    prompts = row.clusters("subject")
    asked = np.stack([texts[row.shots[place].plain] for place in subject])
    per_picture = {
        "clip_i": ("subject", scores.fidelity(row.clip[subject], references.clip)),
        "dino": ("subject", scores.fidelity(row.encoder[subject], references.encoder)),
        "clip_t": ("subject", scores.text_agreement(row.clip[subject], asked)),
        "drift": ("class", scores.drift(row.encoder[bare], base.encoder[bare])),
        "other_drift": ("other", scores.drift(row.encoder[other], base.encoder[other])),
        "leak": ("class", scores.leak(row.encoder[bare], base.encoder[bare], references.encoder)),
        "copy": ("subject", scores.nearest(row.encoder[subject], references.encoder)[1]),
    }
    found = {key: statistics.cluster_means(values, row.clusters(kind)) for key, (kind, values) in per_picture.items()}
    variety = scores.diversity(row.encoder[subject], prompts)
    return {**found, "diversity": variety} if len(variety) else found


def paired(values: Mapping[str, Mapping[str, np.ndarray]], seed: int) -> list[dict[str, Any]]:
    """Paired differences of all pairs of rows, metric by metric; `decided` holds for all pairs of a metric together."""
    found: list[dict[str, Any]] = []
    for metric in dict.fromkeys(key for row in values.values() for key in row):
        rows = [name for name, row in values.items() if metric in row and not (metric in FROM_BASE and name == BASE_ROW)]
        flat = {name: values[name][metric].reshape(len(values[name][metric]), -1).mean(axis=1) for name in rows}
        tests = [(a, b, statistics.paired_difference(flat[a], flat[b], seed)) for a, b in combinations(rows, 2)]
        adjusted = statistics.holm([test.p for _, _, test in tests])
        found += [{"metric": metric, "a": a, "b": b, "difference": _round(test.difference), "low": _round(test.low),
                   "high": _round(test.high), "p": _round(p), "n": test.n, "decided": p <= ALPHA}
                  for (a, b, test), p in zip(tests, adjusted, strict=True)]
    return found


def _all_there(planned: list[tuple[str, str, Path, list[Shot]]]) -> None:
    for _, title, place, shots in planned:
        missing = [shot.file for shot in shots if not rendered_as(place, shot)]
        if missing:
            raise Problem(f"{title} lacks {len(missing)} of {len(shots)} pictures, the first is {place / 'images' / missing[0]}.",
                          "Scores compare rows picture by picture, so every row needs all of them.", "Run `finetune evaluate` on the folder.")


def _references(files: list[str], judge: Judge) -> References:
    """The real pictures: upright, RGB, the square in the middle."""
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
    return References(list(files), judge.clip_images(pictures), judge.encode(pictures))


def _look(judge: Judge, name: str, title: str, place: Path, folder: Path, shots: list[Shot]) -> Seen:
    pictures = []
    for shot in shots:
        with Image.open(place / "images" / shot.file) as picture:
            pictures.append(picture.convert("RGB"))
    return Seen(name, title, place.relative_to(folder).as_posix(), shots, judge.clip_images(pictures), judge.encode(pictures))


def _row(row: Seen, values: Mapping[str, np.ndarray], references: References, texts: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """One row of scores.json."""
    intervals = {key: statistics.crossed_interval(value, seed) if value.ndim == 2 else statistics.interval(value, seed)
                 for key, value in values.items()}
    clip_i = scores.fidelity(row.clip, references.clip).mean(axis=1)
    dino = scores.fidelity(row.encoder, references.encoder).mean(axis=1)
    clip_t = scores.text_agreement(row.clip, np.stack([texts[shot.plain] for shot in row.shots]))
    places, similarity = scores.nearest(row.encoder, references.encoder)
    images = []
    for place, shot in enumerate(row.shots):
        image = {"file": f"{row.place}/images/{shot.file}", "kind": shot.kind, "prompt": shot.prompt, "seed": shot.seed,
                 "clip_i": _round(clip_i[place]), "dino": _round(dino[place]), "clip_t": _round(clip_t[place])}
        if shot.kind == "subject":
            image["nearest"] = {"file": references.files[places[place]], "similarity": _round(similarity[place])}
        images.append(image)
    return {"row": row.row, "title": row.title, "scores": {key: _interval(value) for key, value in intervals.items()}, "images": images}


def _real(references: References, seed: int) -> dict[str, Any]:
    """The ceiling: the real pictures among themselves. Needs two of them."""
    found: dict[str, Any] = {}
    if len(references.files) > 1:
        clip, encoder = scores.among(references.clip), scores.among(references.encoder)
        found = {"clip_i": statistics.pairs_interval(clip, seed), "dino": statistics.pairs_interval(encoder, seed),
                 "copy": statistics.interval(scores.nearest_other(encoder)[1], seed)}
    return {"row": "real", "title": "The real pictures", "scores": {key: _interval(value) for key, value in found.items()}, "images": []}


def _interval(value: statistics.Interval) -> dict[str, Any]:
    return {"mean": _round(value.mean), "low": _round(value.low), "high": _round(value.high), "n": value.n}


def _round(value: float | None) -> float | None:
    return None if value is None else round(float(value), 6)
