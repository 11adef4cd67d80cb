"""The inpainting and depth variants: trained by one command from the base's own step zero, and what they are given is what diffusers gives."""

from __future__ import annotations

from pathlib import Path
from random import Random

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune.cli.app import run
from finetune.errors import Problem
from finetune.model import delta, load
from finetune.model.conditioning import Cond
from finetune.toybox import masks, variant_delta, variant_measure
from finetune.toybox.datasets import describe
from finetune.toybox.silhouette import overlap
from finetune.toybox.world import render_shot


@pytest.fixture(scope="module")
def shots():
    """Eight pictures of the world with their truth."""
    return [render_shot(picture) for picture in describe(8, seed=77)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Ten steps on the same eight pictures with the same noises, by the command; and the loss of each. Broken off after six."""
    output = tmp_path_factory.mktemp("variants") / "toybox-depth"
    words = ["toybox", "variant", "depth", "--steps", "10", "--rank", "4", "--learning-rate", "4e-3", "--output", str(output)]
    drawn, fit, train, kept = variant_delta.ShotSource.batch, variant_delta.fit, variant_delta.train, []

    def interrupted(*given):
        for progress in fit(*given):
            kept.append(float(progress.loss))
            if len(kept) == 6:
                raise KeyboardInterrupt
            yield progress

    def watched(*given):
        for progress in fit(*given):
            kept.append(float(progress.loss))
            yield progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variant_delta, "VALIDATION", 16)
        patch.setattr(variant_delta.ShotSource, "batch", lambda self, step, *rest: drawn(self, 0))
        patch.setattr(variant_delta, "train", lambda *given: train(*given, save_every=5))
        patch.setattr(variant_delta, "fit", interrupted)
        assert run(words) != 0 and not output.exists()
        patch.setattr(variant_delta, "fit", watched)
        assert run(words) == 0
    return output, kept


def test_step_zero_is_the_base():
    """Whatever the new channels hold."""
    plain, base = load("toybox"), load("toybox")
    variant_delta.Widened(variant_delta.Settings(model="toybox"), "inpainting").attach(base)
    torch.manual_seed(0)
    noisy, timesteps, cond, extra = torch.randn(2, 4, 16, 16), torch.tensor([900, 40]), Cond(torch.randn(2, 32, 160)), torch.randn(2, 5, 16, 16)
    with torch.no_grad():
        assert torch.equal(base.ask(noisy, timesteps, cond, extra=extra), plain.ask(noisy, timesteps, cond))
    assert base.unet.config.in_channels == 9


def test_training_lowers_the_loss_and_goes_on_where_it_stopped(made):
    _, losses = made
    assert len(losses) == 6 + 5  # the checkpoint was of step 5
    assert losses[6] == pytest.approx(losses[5], rel=1e-5)  # step 6, twice: interrupted and taken up again
    assert losses[-1] < 0.9 * losses[0]


def test_the_command_writes_a_whole_folder_and_a_delta_that_say_the_same(made):
    output, _ = made
    assert not list(output.parent.glob("*.work")) and not list(output.parent.glob(".*"))
    facts = delta.facts(output / "delta.safetensors")
    assert facts["command"] == "finetune toybox variant depth --steps 10 --learning-rate 0.004 --rank 4 --seed 0"
    assert (facts["base"], facts["variant"], facts["steps"]) == (load("toybox").hash, "depth", "10")
    base = load("toybox")
    delta.apply(base.unet, output / "delta.safetensors", base.hash)
    folder = load_file(output / "unet" / "diffusion_pytorch_model.safetensors")
    for name, tensor in base.unet.state_dict().items():
        assert torch.allclose(tensor, folder[name].float(), rtol=2**-10, atol=2**-24), name
    pipeline = diffusers.StableDiffusionDepth2ImgPipeline.from_pretrained(output, depth_estimator=None, feature_extractor=None)
    assert pipeline.unet.config.in_channels == 5
    assert load(str(output)).location.variant == "depth"


def test_write_and_apply_are_exact_within_half_precision(tmp_path):
    base, old = load("toybox"), load("toybox")
    torch.manual_seed(1)
    delta.widen(old.unet, 5)
    conv = torch.nn.Conv2d(5, 64, 3, padding=1)
    linear, square = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.attentions.0.proj_in"
    pairs = {linear: (torch.randn(2, 160), torch.randn(192, 2)), square: (torch.randn(3, 192), torch.randn(192, 3))}
    delta.write(tmp_path / "d.safetensors", conv, pairs, variant="depth", base=base.hash, facts={"steps": 7})
    assert delta.facts(tmp_path / "d.safetensors")["steps"] == "7"
    delta.apply(base.unet, tmp_path / "d.safetensors", base.hash)
    modules, before = dict(base.unet.named_modules()), old.unet.state_dict()
    assert torch.equal(base.unet.conv_in.weight, conv.weight.half().float()) and torch.equal(base.unet.conv_in.bias, conv.bias.half().float())
    for name, (down, up) in pairs.items():
        expected = before[f"{name}.weight"] + torch.einsum("or,ri->oi", up.half().float(), down.half().float()).view_as(before[f"{name}.weight"])
        assert torch.allclose(modules[name].weight, expected, atol=1e-5)
    after = base.unet.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if not name.startswith(("conv_in", linear, square)))


def test_what_does_not_belong_is_refused(tmp_path):
    base, own = load("toybox"), tmp_path / "own.safetensors"
    delta.write(own, torch.nn.Conv2d(5, 64, 3), {}, variant="depth", base=base.hash, facts={})
    with pytest.raises(Problem, match="belongs to another base") as told:
        delta.apply(base.unet, own, "0123456789abcdef")
    assert base.hash in str(told.value) and "0123456789abcdef" in str(told.value) and base.unet.config.in_channels == 4
    with pytest.raises(Problem, match="There is no delta"):
        delta.apply(base.unet, tmp_path / "none.safetensors", base.hash)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(Problem, match="is no delta"):
        delta.apply(base.unet, tmp_path / "other.safetensors", base.hash)
    delta.write(tmp_path / "odd.safetensors", torch.nn.Conv2d(5, 64, 3), {"no.such.module": (torch.zeros(1, 2), torch.zeros(2, 1))},
                variant="depth", base=base.hash, facts={})
    with pytest.raises(Problem, match="does not fit.*no.such.module"):
        delta.apply(base.unet, tmp_path / "odd.safetensors", base.hash)
    with pytest.raises(Problem, match="not empty"):
        variant_delta.widened("toybox", "depth", tmp_path)


def test_channels_are_those_of_the_diffusers_pipelines(shots):
    base = load("toybox")
    parts = {"vae": base.vae, "text_encoder": base.text_encoder, "tokenizer": base.tokenizer, "unet": base.unet, "scheduler": variant_measure.sampler(base)}
    paint = diffusers.StableDiffusionInpaintPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    mask = Image.fromarray(masks.dilated(shots[0].mask, 2).astype(np.uint8) * 255)
    picture = paint.image_processor.preprocess(shots[0].picture)
    grown = paint.mask_processor.preprocess(mask)
    small, latents = paint.prepare_mask_latents(grown, picture * (grown < 0.5), 1, 64, 64, torch.float32, base.device, torch.Generator().manual_seed(5), False)
    own = masks.inpainting_channels(base.vae, variant_delta.pictures_of(shots[:1]), torch.from_numpy(np.array(mask) / 255.0)[None, None],
                                    torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5)))
    assert torch.allclose(own, torch.cat([small, latents], dim=1), atol=1e-5) and 0 < own[:, 0].mean() < 1

    deep = diffusers.StableDiffusionDepth2ImgPipeline(**parts, depth_estimator=None, feature_extractor=None)
    maps = torch.stack([torch.from_numpy(np.array(shot.depth)).float() for shot in shots])
    for row in range(len(shots)):  # the pipeline is asked for one at a time
        expected = deep.prepare_depth_map([shots[row].picture], maps[row:row + 1], 1, False, torch.float32, base.device)
        assert torch.allclose(masks.depth_channels(maps[row:row + 1, None], (16, 16)), expected, atol=1e-5)
    flat = masks.depth_channels(torch.full((1, 1, 64, 64), 9.0), (16, 16))
    assert torch.isfinite(flat).all()


def test_every_kind_of_mask(shots):
    random, own = Random(3), np.asarray(shots[0].mask) > 127
    drawn = {kind: masks.draw_mask(shots[0].mask, random, kind) for kind in masks.KINDS}
    assert all(mask.shape == (64, 64) and mask.dtype == bool and mask.any() for mask in drawn.values())
    assert drawn["everything"].all() and np.array_equal(drawn["own"], own)
    for kind in ("dilated", "box"):
        assert drawn[kind][own].all() and drawn[kind].sum() > own.sum() and not drawn[kind].all()
    assert not drawn["strokes"].all()
    kinds = [masks.draw_mask(shots[0].mask, random).mean() == 1 for _ in range(400)]
    assert 0.17 < np.mean(kinds) < 0.33  # a quarter of them everything
    assert sum(masks.KINDS.values()) == pytest.approx(1)


def test_a_number_is_written_as_people_write_it():
    assert variant_measure.shown({"mean": 0.98512, "low": 0.9649, "high": 0.991, "n": 9}) == ".985 (.96-.99)"
    assert variant_measure.shown({"mean": 24.307, "low": 23.94, "high": 24.71, "n": 9}) == "24.31 (23.9-24.7)"


def test_psnr_of_a_part():
    true = np.zeros((1, 3, 4, 4), np.uint8)
    drawn, where = true.copy(), np.zeros((1, 4, 4), bool)
    where[:, :2], drawn[:, :, :2], drawn[:, :, 2:] = True, 51, 255  # off by a fifth of the range inside, wholly outside
    assert variant_measure.psnr(drawn, true, where) == pytest.approx(20 * np.log10(5))


def test_overlap_of_masks():
    one, other, empty = torch.tensor([[[True, True, False]]]), torch.tensor([[[False, True, True]]]), torch.zeros(1, 1, 3, dtype=torch.bool)
    assert overlap(one, other) == pytest.approx(1 / 3) and overlap(one, empty) == 0 and overlap(empty, empty) == 1
