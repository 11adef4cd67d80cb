"""Train the toybox's judge, part one: a CLIP whose picture tower knows shapes, not only places and colours.

Contrastive learning (Radford et al., 2021) stops once place and colour tell most pictures of a batch apart. So every
batch is made of groups that share two attributes, a caption counts as right for every picture it is true of, and
linear heads ask the picture tower for each attribute directly (they are dropped on saving). The text tower is the
base's own, already able to read its captions; only its projection is learned.

Part two, the encoder that knows individuals, is in `encoder`.
"""

from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, ResNetConfig

from finetune.model.dual_encoder import DualEncoder
from finetune.toybox.captions import DROPS, KINDS, Said, caption, full_caption
from finetune.toybox.progress import Checkpoint, Log, cosine, set_rate
from finetune.toybox.ruler import augment, labels
from finetune.toybox.text import tokens
from finetune.toybox.world import Picture, seconds_for

PROJECTION = 128
# Silence says nothing: "a photo of a cat" is as true of a striped cat as of a plain one. Prompts about a subject are
# silent about its look, and a judge that took silence for "plain" would punish whoever draws the subject's stripes.
_DROPS = {**DROPS, "colour": 0.3, "pattern": 0.3, "scene": 0.10, "style": 0.08}


def vision_configuration() -> ResNetConfig:
    """Three stages of one basic block at 16 x 16, 8 x 8 and 4 x 4; 0.9 million parameters."""
    return ResNetConfig(embedding_size=32, hidden_sizes=[48, 96, 192], depths=[1, 1, 1], layer_type="basic")


def build(text_encoder: CLIPTextModel) -> DualEncoder:
    """A dual encoder around a copy of the base's text encoder."""
    model = DualEncoder(vision_configuration(), text_encoder.config, PROJECTION, image_size=64)
    model.text.load_state_dict(text_encoder.state_dict())
    return model


def groups(pictures: list[Picture], seed: int, count: int = 4, size: int = 32) -> list[int]:
    """Positions of pictures for one batch: groups whose members share two attributes (hard negatives)."""
    random = Random(f"groups {seed}")
    pairs = (("scene", "style"), ("colour", "scene"), ("colour", "pattern"), ("pattern", "scene"), ("noun", "colour"))
    index = _index(pictures, pairs)
    chosen: list[int] = []
    while len(chosen) < count * size:
        shelf = index[random.choice(pairs)]
        members = shelf[random.choice(sorted(shelf))]
        chosen += random.sample(members, min(size, len(members), count * size - len(chosen)))
    return chosen


_SHELVES: dict[int, dict] = {}


def _index(pictures: list[Picture], pairs: tuple[tuple[str, str], ...]) -> dict:
    """Pictures by the values of each pair of attributes; built once per list."""
    if id(pictures) not in _SHELVES:
        shelves: dict = {pair: {} for pair in pairs}
        for place, picture in enumerate(pictures):
            for one, other in pairs:
                key = (getattr(picture, one), getattr(picture, other))
                shelves[(one, other)].setdefault(key, []).append(place)
        _SHELVES.clear()
        _SHELVES[id(pictures)] = shelves
    return _SHELVES[id(pictures)]


def matches(said: list[Said], pictures: list[Picture]) -> Tensor:
    """True where nothing that caption j says is wrong of picture i, (pictures, captions)."""
    table = torch.ones(len(pictures), len(said), dtype=torch.bool)
    for kind in ("noun", "colour", "second", "pattern", "scene", "style"):
        values = [getattr(picture, kind) for picture in pictures]
        named = [getattr(one, kind) for one in said]
        table &= torch.tensor([[name is None or name == value for name in named] for value in values])
    return table


def named(said: list[Said]) -> Tensor:
    """How many attributes each caption names, (captions,)."""
    kinds = ("noun", "colour", "second", "pattern", "scene", "style")
    return torch.tensor([sum(getattr(one, kind) is not None for kind in kinds) for one in said], dtype=torch.float32)


def rivals(pictures: list[Picture], random: Random) -> list[Said]:
    """For each picture its full caption, then for each one that differs in one attribute, half of them in the pattern.

    Batches hold few captions that are wrong in the pattern alone, and without such a model learns to read captions as bags of
    words (Yuksekgonul et al., 2023: composed negatives are the cure).
    """
    swapped = []
    for picture in pictures:
        kind = "pattern" if random.random() < 0.5 else random.choice([kind for kind in KINDS if kind != "pattern"])
        mine = getattr(picture, "noun" if kind == "class" else kind)
        swapped.append(_swapped(picture, kind, random.choice([value for value in KINDS[kind] if value != mine])))
    return [_fully_said(one) for one in [*pictures, *swapped]]


def _fully_said(picture: Picture) -> Said:
    """The full caption and what it names; "plain" is never named, nor a second colour that is not seen."""
    plain = picture.pattern == "plain"
    second, pattern = (None, None) if plain else (picture.second, picture.pattern)
    return Said(full_caption(picture), picture.noun, picture.colour, second, pattern, picture.scene, picture.style)


def contrastive_loss(picture_features: Tensor, text_features: Tensor, scale: Tensor, table: Tensor, says: Tensor) -> Tensor:
    """Symmetric InfoNCE in which every true pair counts as a positive (Khosla et al., 2020).

    There may be more captions than pictures: those beyond are rivals that a picture must tell from its own (see `rivals`).

    Of two captions that are true of a picture the one that says more is wanted more, four times as much for every attribute
    it names: so stripes that are mentioned beat silence, and silence is no lie.

    Args:
        table: true pairs, (pictures, captions); caption i < pictures is true of picture i. says: attributes each caption names, (captions,).
    """
    logits = scale * picture_features @ text_features.T
    true = table.float()
    wanted = true * 4.0 ** (says - says.max())
    rows = -(F.log_softmax(logits, dim=1) * wanted / wanted.sum(1, keepdim=True)).sum(1).mean()
    own, true = logits[:, : len(logits)], true[:, : len(logits)]
    columns = -(F.log_softmax(own, dim=0) * true / true.sum(0, keepdim=True)).sum(0).mean()
    return (rows + columns) / 2


def train(
    pixels: np.ndarray,
    pictures: list[Picture],
    soft_pixels: np.ndarray,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    work: Path,
    *,
    steps: int = 1500,
    rate: float = 2e-3,
    seed: int = 0,
) -> DualEncoder:
    """Train the picture tower and both projections.

    Args:
        pixels, pictures: uint8 pictures and their descriptions.
        soft_pixels: the first of these through the autoencoder; they stand in for the originals half of the time.
        text_encoder, tokenizer: of the base; copied, the tower itself stays as it is.
        work: folder of checkpoint and log.
    """
    torch.manual_seed(seed)
    model = build(text_encoder)
    model.text.requires_grad_(False)
    heads = nn.ModuleDict({kind: nn.Linear(192, len(values)) for kind, values in KINDS.items()})
    both = nn.ModuleDict({"model": model, "heads": heads})
    learned = [parameter for parameter in both.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=1e-3)
    checkpoint = Checkpoint(Path(work) / "clip.ckpt")
    first, before = checkpoint.resume(both, optimizer)
    log = Log(Path(work) / "clip.jsonl", before)
    truth = labels(pictures)
    for step in range(first, steps):
        both.train()
        model.text.eval()
        set_rate(optimizer, rate * cosine(step, steps))
        chosen = groups(pictures, seed=seed * 1_000_003 + step)
        shown = [pictures[place] for place in chosen]
        random = Random(f"judge {seed} {step}")
        said = [caption(picture, random, _DROPS, identifiers=0.05) for picture in shown]
        said += rivals(shown, Random(f"rivals {seed} {step}"))
        soft = [place < len(soft_pixels) and random.random() < 0.5 for place in chosen]
        seen = np.stack(
            [(soft_pixels if soften else pixels)[place] for place, soften in zip(chosen, soft, strict=True)]
        )
        seen = augment(torch.from_numpy(seen).float() / 255, seed=seed * 1_000_003 + step)
        pooled = model.pooled_pictures(model.normalise(seen).contiguous(memory_format=torch.channels_last))
        with torch.no_grad():
            states = model.text(input_ids=tokens(tokenizer, [one.text for one in said], full=False)).pooler_output
        texts = F.normalize(model.text_projection(states), dim=-1)
        features = F.normalize(model.visual_projection(pooled), dim=-1)
        scale = model.logit_scale.exp().clamp(max=100)
        loss = contrastive_loss(features, texts, scale, matches(said, shown), named(said))
        rows = torch.tensor(chosen)
        asked = sum(F.cross_entropy(heads[kind](pooled), truth[kind][rows]) for kind in KINDS)
        optimizer.zero_grad(set_to_none=True)
        (loss + asked).backward()
        optimizer.step()
        checkpoint.maybe(both, optimizer, step + 1, log.seconds)
        if step % 50 == 0 or step + 1 == steps:
            log(step=step, contrastive=float(loss.detach()), heads=float(asked.detach()))
    return model.eval()


@torch.no_grad()
def prompt_matching(
    model: DualEncoder, tokenizer: CLIPTokenizer, pixels: np.ndarray, pictures: list[Picture]
) -> dict[str, float]:
    """Swap one attribute's word in each full caption: how often does the true caption win, per attribute?"""
    seen = model.normalise(torch.from_numpy(np.array(pixels)).float() / 255)
    features = torch.cat([model.image_features(seen[start : start + 100]) for start in range(0, len(seen), 100)])
    scores = {}
    for kind, values in KINDS.items():
        swaps = [full_caption(_swapped(picture, kind, value)) for picture in pictures for value in values]
        texts = [
            model.text_features(tokens(tokenizer, swaps[start : start + 250], full=False)) for start in range(0, len(swaps), 250)
        ]
        table = torch.cat(texts).view(len(pictures), len(values), -1)
        found = (table * features[:, None]).sum(-1).argmax(dim=1)
        scores[kind] = float(found.eq(labels(pictures)[kind]).float().mean())
    return scores


def _swapped(picture: Picture, kind: str, value: str) -> Picture:
    """A picture with one attribute replaced."""
    changed = {**vars(picture), "noun" if kind == "class" else kind: value}
    if kind == "pattern" and value != "plain" and picture.second is None:
        changed["second"] = seconds_for(picture.colour)[0]
    return Picture(**changed)
