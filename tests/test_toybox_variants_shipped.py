"""The inpainting and depth variants that the package carries: they belong to its base, do what they are for, and their page is about them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetune import diffusion, runs
from finetune.errors import Problem
from finetune.model import delta, load
from finetune.model.text import encode
from finetune.toybox import variant_delta, variant_measure
from finetune.toybox.captions import KINDS, full_caption
from finetune.toybox.datasets import describe
from finetune.toybox.masks import inpainting_channels
from finetune.toybox.silhouette import Reader, overlap
from finetune.toybox.world import render_shot

SHIPPED = variant_measure.VARIANTS


def test_the_silhouette_reader_finds_the_thing():
    shots = [render_shot(picture) for picture in describe(60, seed=78)]
    reader = Reader.load(SHIPPED / "silhouette.safetensors")
    seen = (variant_delta.pictures_of(shots) + 1) / 2
    true = torch.from_numpy(np.stack([np.array(shot.mask) > 127 for shot in shots]))
    assert overlap(reader.read(seen), true).mean() > 0.87
    assert overlap(reader.read(seen), true.roll(20, dims=2)).mean() < 0.4


@pytest.mark.parametrize("variant", ["inpainting", "depth"])
def test_the_page_is_about_these_files(variant):
    """Made by `finetune toybox evaluate VARIANT --output finetune/toybox/weights/variants`; to be made anew whenever they are."""
    found, page = runs.read_json(SHIPPED / f"{variant}.json"), (SHIPPED / "README.md").read_text(encoding="utf-8")
    base = load("toybox")
    assert found["delta"] == delta.facts(SHIPPED / f"{variant}.safetensors") and found["delta"]["base"] == base.hash == found["model_hash"]
    assert found["bytes"] == (SHIPPED / f"{variant}.safetensors").stat().st_size and found["count"] >= 100
    for name, row in found["measured"].items():
        assert f"| {name} | {variant_measure.shown(row['variant'])} | {variant_measure.shown(row['plain base'])} |" in page
    assert {tensor.dtype for tensor in load_file(SHIPPED / f"{variant}.safetensors").values()} == {torch.float16}


def test_the_depth_variant_keeps_the_silhouette(monkeypatch):
    """Twelve pictures and eight steps; the page has two hundred."""
    monkeypatch.setattr(variant_measure, "STEPS", 8)
    found = variant_measure.measure("depth", 12, say=lambda sentence: None)["measured"]
    mine, plain = (found["silhouette: IoU with the given thing's"][who]["mean"] for who in ("variant", "plain base"))
    assert mine > plain + 0.03
    assert found["class as prompted"]["variant"]["mean"] >= 9 / 12
    assert {name.split()[0] for name in found if name.endswith("as prompted")} == set(KINDS)


def test_the_inpainting_variant_uses_what_it_is_shown():
    """What the network makes of the unmasked half, from much noise: nearer to the true latents than the plain base, and not by a little."""
    plain, wide = load("toybox"), load("toybox-inpainting")
    pictures = describe(8, seed=79)
    shots = [render_shot(picture) for picture in pictures]
    pixels, cond = variant_delta.pictures_of(shots), encode(plain, [full_caption(picture) for picture in pictures])
    masks = torch.zeros(8, 1, 64, 64)
    masks[..., :32] = 1
    with torch.no_grad():
        latents = plain.vae.encode(pixels).latent_dist.mean
        extra, timesteps = inpainting_channels(plain.vae, pixels, masks), torch.full((8,), 850)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4))
        noisy = diffusion.add_noise(latents, noise, timesteps, plain.schedule)
        kept = 1 - extra[:, :1]
        mine, theirs = (((pred - noise) * kept).square().sum() for pred in (wide.ask(noisy, timesteps, cond, extra=extra), plain.ask(noisy, timesteps, cond)))
    assert mine < 0.6 * theirs


def test_a_variant_is_no_base_for_another(tmp_path):
    with pytest.raises(Problem, match="is a variant already"):
        variant_delta.widened("toybox-depth", "depth", tmp_path / "again")
