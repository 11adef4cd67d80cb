"""Train the toybox's judge, part two: an encoder that tells individuals apart, as DINO does for real pictures.

Subject fidelity asks whether this is the same thing, wherever it stands. So the encoder is trained without labels:
two pictures of one look, in different places, sizes and lights, attract; everything else in the batch repels (van den
Oord et al., 2018). Looks come in families (the same noun in other colours, the same colours on another noun, another
second colour) whose members stand in the same places, so that neither the noun nor the place gives the answer away.
The held-out subjects are never among them.

Shapes: F families of M = 4 looks, V = 3 views, pictures (F, M, V, 3, 64, 64).
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ResNetConfig, ResNetModel

from finetune.toybox.progress import Checkpoint, Log, cosine, set_rate
from finetune.toybox.ruler import augment
from finetune.toybox.shapes import NOUNS, RGB
from finetune.toybox.subjects import SUBJECTS, Subject, oracle
from finetune.toybox.world import COLOURS, NOUN_NAMES, PATTERNS, SCENE_NAMES, STYLES, Look, draw

VIEWS, MEMBERS = 3, 4
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def configuration() -> ResNetConfig:
    """As the judge's picture tower: stages at 16 x 16, 8 x 8 and 4 x 4, 192 features."""
    return ResNetConfig(embedding_size=32, hidden_sizes=[48, 96, 192], depths=[1, 1, 1], layer_type="basic")


def random_look(random: Random, noun: str | None = None) -> Look:
    """Any look but a held-out subject's: palette colours half of the time, any colours otherwise, parts repainted."""
    while True:
        kind = noun or random.choice(NOUN_NAMES)
        body, second = _colour(random), _colour(random)
        if _distance(body, second) < 90:
            continue
        pattern = random.choices(PATTERNS, (0.25, 0.25, 0.25, 0.25))[0]
        names = sorted({part.name for part in NOUNS[kind] if part.lined and part.fill != "body"})
        parts = ((random.choice(names), _colour(random)),) if names and random.random() < 0.4 else ()
        look = Look(kind, body, pattern, None if pattern == "plain" else second, parts)
        if not any(_alike(look, subject.look) for subject in SUBJECTS.values()):
            return look


def family(random: Random) -> list[Look]:
    """A look and three that differ from it in one way: other colours, another noun, another second colour or pattern."""
    first = random_look(random)
    recoloured = random_look(random, first.noun)
    recoloured = replace(recoloured, pattern=first.pattern, second=recoloured.second or _colour(random))
    if first.pattern == "plain":
        recoloured = replace(recoloured, second=None)
    other = replace(first, noun=random.choice([noun for noun in NOUN_NAMES if noun != first.noun]), parts=())
    while True:
        change = random_look(random, first.noun)
        if change.pattern != first.pattern or first.pattern != "plain":
            break
    varied = replace(change, body=first.body, parts=first.parts)
    looks = [first, recoloured, other, varied]
    if any(_alike(look, subject.look) for look in looks for subject in SUBJECTS.values()):
        return family(random)
    return looks


def _colour(random: Random) -> RGB:
    if random.random() < 0.4:
        return tuple(max(0, min(255, value + random.randint(-9, 9))) for value in random.choice(list(COLOURS.values())))
    return tuple(random.randrange(15, 256) for _ in range(3))


def _distance(one: RGB, other: RGB) -> float:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5


def _alike(look: Look, subject: Look) -> bool:
    return look.noun == subject.noun and look.pattern == subject.pattern and _distance(look.body, subject.body) < 70


def _views(seed: int) -> np.ndarray:
    """One family, (M, V, 3, 64, 64): each view puts all members into the same scene and style."""
    random = Random(f"family {seed}")
    looks = family(random)
    scenes = random.sample(SCENE_NAMES, VIEWS)
    styles = ["photo" if random.random() < 0.8 else random.choice(STYLES) for _ in range(VIEWS)]
    pictures = [
        [np.asarray(draw(look, scene, style, random.randrange(2**31))).transpose(2, 0, 1) for scene, style in
         zip(scenes, styles, strict=True)]
        for look in looks
    ]
    return np.array(pictures)


def families(work: Path, count: int = 2000, seed: int = 0, processes: int = 2) -> np.ndarray:
    """Rendered families (F, M, V, 3, 64, 64), uint8, kept under `work`."""
    path = Path(work) / f"families-{seed}-{count}.npy"
    if not path.exists():
        seeds = [seed * 10_000_000 + place for place in range(count)]
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            rendered = np.array(list(pool.map(_views, seeds, chunksize=50)))
        partial = path.with_suffix(".partial.npy")
        np.save(partial, rendered)
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")


def features(model: ResNetModel, pictures: Tensor) -> Tensor:
    """Unit-length features (B, 192) of pictures (B, 3, 64, 64) in [0, 1]."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    pixels = ((pictures - mean) / std).contiguous(memory_format=torch.channels_last)
    return F.normalize(model(pixel_values=pixels).pooler_output.flatten(1), dim=-1)


def train(
    rendered: np.ndarray, work: Path, *, steps: int = 1200, batch: int = 16, rate: float = 2e-3, seed: int = 0
) -> ResNetModel:
    """Train on families (F, M, V, 3, 64, 64); `batch` counts families, so 8 pictures each per step."""
    torch.manual_seed(seed)
    model = ResNetModel(configuration()).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-3)
    checkpoint = Checkpoint(Path(work) / "encoder.ckpt")
    first, before = checkpoint.resume(model, optimizer)
    log = Log(Path(work) / "encoder.jsonl", before)
    model.train()
    for step in range(first, steps):
        set_rate(optimizer, rate * cosine(step, steps))
        generator = np.random.default_rng([seed, step])
        chosen = generator.integers(len(rendered), size=batch)
        one, other = generator.permutation(VIEWS)[:2]
        seen = torch.from_numpy(rendered[np.sort(chosen)][:, :, [one, other]]).float() / 255
        seen = seen.transpose(0, 2).flatten(0, 2)  # (2 views * M * batch, 3, 64, 64)
        halves = [augment(half, seed=2 * step + place) for place, half in enumerate(seen.chunk(2))]
        loss = attract(features(model, torch.cat(halves)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        checkpoint.maybe(model, optimizer, step + 1, log.seconds)
        if step % 50 == 0 or step + 1 == steps:
            log(step=step, loss=float(loss.detach()))
    return model.eval()


def attract(both: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent (Chen et al., 2020) of unit features (2N, D) whose rows i and i + N show the same look."""
    similar = both @ both.T / temperature
    similar = similar.masked_fill(torch.eye(len(both), dtype=torch.bool), float("-inf"))
    partner = torch.arange(len(both)).roll(len(both) // 2)
    return F.cross_entropy(similar, partner)


@torch.no_grad()
def same_subject_auc(model: ResNetModel, others: int = 15, views: int = 6, seed: int = 5) -> dict[str, float]:
    """ROC area of cosine for telling two photographs of one subject from photographs of two, over unseen looks.

    Returns:
        `all`: the held-out subjects and `others` random looks, every pair in different scenes;
        `same noun`: each subject against random looks of its own noun, the harder question.
    """
    random = Random(f"foils {seed}")
    looks = [random_look(random) for _ in range(others)]
    strangers = [Subject(f"stranger {place}", look.noun, look, "") for place, look in enumerate(looks)]
    everyone = [*SUBJECTS.values(), *strangers]
    scores = {"all": _auc(model, everyone, views)}
    doubles = []
    for subject in SUBJECTS.values():
        foils = [Subject(f"{subject.name} foil {k}", subject.noun, random_look(random, subject.noun), "") for k in (0, 1, 2)]
        doubles.append(_auc(model, [subject, *foils], views))
    return {**scores, "same noun": float(np.mean(doubles))}


def _auc(model: ResNetModel, people: list[Subject], views: int) -> float:
    scenes = SCENE_NAMES[:views]
    pictures = [np.asarray(oracle(one, scene, "photo", place)) for one in people for place, scene in enumerate(scenes)]
    found = features(model, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255)
    cosine_table = (found @ found.T).numpy()
    who, where = np.divmod(np.arange(len(found)), views)
    counted = np.triu(where[:, None] != where[None], 1)
    same = (who[:, None] == who[None]) & counted
    right, wrong = cosine_table[same], cosine_table[counted & ~same]
    return float((right[:, None] > wrong[None]).mean() + 0.5 * (right[:, None] == wrong[None]).mean())


def save(model: ResNetModel, folder: Path) -> None:
    """A transformers folder with a preprocessor that only resizes and normalises."""
    folder = Path(folder)
    model.to(memory_format=torch.contiguous_format).save_pretrained(folder)
    preparation = {"size": {"height": 64, "width": 64}, "image_mean": list(MEAN), "image_std": list(STD)}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation, indent=2) + "\n", encoding="utf-8")
