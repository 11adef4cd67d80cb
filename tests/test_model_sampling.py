"""The sampling loop against diffusers' own pipelines, with the same draws, on tiny random networks."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from finetune.errors import Problem
from finetune.model import load, render
from finetune.model.canvas import encode_picture, prepare
from finetune.model.sampling import first_step
from finetune.model.schedulers import SAMPLERS, make

PROMPTS, SEEDS = ["a photo of a dog", "a red mug on the beach", "a photo of a dog"], [3, 4, 5]


@pytest.fixture(scope="module")
def base(tiny_model):
    return load(str(tiny_model))


@pytest.fixture(scope="module")
def v_base(tiny_v_model):
    return load(str(tiny_v_model))


def other_unet(base, channels: int):
    """The tiny base with a random network of so many input channels."""
    with torch.random.fork_rng():
        torch.manual_seed(channels)
        config = dict(base.unet.config) | {"in_channels": channels}
        unet = diffusers.UNet2DConditionModel.from_config(config).eval().requires_grad_(False)
    return replace(base, unet=unet)


@pytest.fixture(scope="module")
def inpainting(base):
    return other_unet(base, 9)


@pytest.fixture(scope="module")
def depth_base(base):
    return other_unet(base, 5)


def picture(width=32, height=32, seed=0) -> Image.Image:
    """Smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def half_mask(width=32, height=32) -> Image.Image:
    """White on the right."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def generators(seeds=SEEDS):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def parts(base, kind):
    """diffusers' pipeline over the same modules."""
    pipe = kind(vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer, unet=base.unet, safety_checker=None,
                scheduler=make(base.scheduler_config, "ddim"), feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def agree(ours, theirs, tolerance=1e-4):
    ours = torch.stack(list(ours))
    assert torch.isfinite(ours).all() and ours.std() > 0.1
    assert (ours - theirs).abs().max() < tolerance


@pytest.mark.parametrize(("sampler", "kind"), [*((sampler, "epsilon") for sampler in SAMPLERS), ("ddpm", "v"), ("euler-a", "v"), ("dpm++-sde", "v")])
def test_text_to_picture_is_diffusers(base, v_base, sampler, kind):
    base = base if kind == "epsilon" else v_base
    pipe = parts(base, diffusers.StableDiffusionPipeline)
    pipe.scheduler = make(base.scheduler_config, sampler)
    theirs = pipe(PROMPTS, negative_prompt=["blurry"] * 3, num_inference_steps=4, guidance_scale=4.0, height=32, width=32,
                  generator=generators(), output_type="latent").images
    agree(render(base, PROMPTS, SEEDS, steps=4, guidance=4.0, negative="blurry", sampler=sampler, output="latent"), theirs)


@pytest.mark.parametrize(("sampler", "options"), [
    ("dpm++", {"karras": True}), ("dpm++-sde", {"karras": True}), ("euler", {"karras": True}), ("unipc", {"karras": True}),
    ("ddpm", {"spacing": "trailing"}), ("euler-a", {"spacing": "trailing"}), ("euler", {"spacing": "linspace"}), ("ddim", {"spacing": "leading"})])
def test_karras_and_spacings_are_diffusers(base, sampler, options):
    pipe = parts(base, diffusers.StableDiffusionPipeline)
    told = {"use_karras_sigmas": True} if options.get("karras") else {"timestep_spacing": options["spacing"]}
    told |= {"algorithm_type": "sde-dpmsolver++"} if sampler == "dpm++-sde" else {}
    pipe.scheduler = getattr(diffusers, SAMPLERS[sampler].kind).from_config(base.scheduler_config, **told)
    theirs = pipe(PROMPTS[:1], num_inference_steps=4, guidance_scale=3.0, height=32, width=32, generator=generators([9]),
                  output_type="latent").images
    agree(render(base, PROMPTS[:1], [9], steps=4, guidance=3.0, sampler=sampler, output="latent", **options), theirs)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(base, sampler):
    together = render(base, PROMPTS, SEEDS, steps=3, sampler=sampler, output="latent")
    alone = render(base, PROMPTS[1:2], SEEDS[1:2], steps=3, sampler=sampler, output="latent", batch=1)
    assert (together[1] - alone[0]).abs().max() < 1e-4  # networks round otherwise in another batch
    assert (together[0] - together[2]).abs().max() > 0.1  # one prompt, two seeds


def test_pixels_are_those_of_the_pipeline(base):
    pipe = parts(base, diffusers.StableDiffusionPipeline)
    pipe.scheduler = make(base.scheduler_config, "dpm++")
    theirs = pipe(PROMPTS[:1], num_inference_steps=3, guidance_scale=4.0, height=48, width=32, generator=generators([1])).images[0]
    ours = render(base, PROMPTS[:1], [1], steps=3, size=(48, 32))[0]
    assert ours.size == theirs.size == (32, 48)
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_one_is_text_to_picture_to_the_bit(base, sampler):
    plain = render(base, PROMPTS[:2], SEEDS[:2], steps=2, sampler=sampler, output="latent")
    begun = render(base, PROMPTS[:2], SEEDS[:2], steps=2, sampler=sampler, output="latent", init=picture(), strength=1.0)
    assert torch.equal(torch.stack(plain), torch.stack(begun))


@pytest.mark.parametrize(("sampler", "strength"), list(zip(SAMPLERS, (0.3, 0.75, 0.3, 0.75, 0.3, 0.75, 0.3), strict=True)))
def test_picture_to_picture_is_diffusers(base, sampler, strength):
    pipe = parts(base, diffusers.StableDiffusionImg2ImgPipeline)
    pipe.scheduler = make(base.scheduler_config, sampler)
    start = encode_picture(base, picture())
    theirs = pipe(PROMPTS[:2], image=start.repeat(2, 1, 1, 1), strength=strength, num_inference_steps=4, guidance_scale=4.0,
                  generator=generators(SEEDS[:2]), output_type="latent").images
    agree(render(base, PROMPTS[:2], SEEDS[:2], steps=4, sampler=sampler, output="latent", init=picture(), strength=strength), theirs)


def test_strength_zero_is_the_picture_as_the_autoencoder_sees_it(base):
    found = render(base, PROMPTS[:1], SEEDS[:1], steps=8, output="latent", init=picture(), strength=0.0)[0]
    pixels = torch.from_numpy(np.asarray(picture(), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    assert torch.allclose(found, base.vae.encode(pixels).latent_dist.mean[0] * 0.9, atol=1e-5)


def test_steps_walked():
    assert [first_step(10, strength) for strength in (0, 0.01, 0.3, 0.55, 1)] == [10, 9, 7, 5, 0]


@pytest.mark.parametrize(("sampler", "strength"), list(zip(SAMPLERS, (1.0, 0.5, 1.0, 0.5, 1.0, 0.5, 0.5), strict=True)))
def test_inpainting_with_an_ordinary_model_is_diffusers(base, sampler, strength):
    pipe = parts(base, diffusers.StableDiffusionInpaintPipeline)
    pipe.scheduler = make(base.scheduler_config, sampler)
    theirs = pipe(PROMPTS[:2], image=encode_picture(base, picture()), mask_image=half_mask(), strength=strength, num_inference_steps=4,
                  masked_image_latents=torch.zeros(1, 4, 16, 16), guidance_scale=4.0, generator=generators(SEEDS[:2]), output_type="latent",
                  height=32, width=32).images
    ours = render(base, PROMPTS[:2], SEEDS[:2], steps=4, sampler=sampler, output="latent", init=picture(), mask=half_mask(), strength=strength)
    agree(ours, theirs)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_with_nine_channels_is_diffusers(inpainting, strength):
    pipe = parts(inpainting, diffusers.StableDiffusionInpaintPipeline)
    pipe.scheduler = make(inpainting.scheduler_config, "dpm++")
    grey = np.asarray(picture(), dtype=np.float32) / 127.5 - 1
    grey = torch.from_numpy(grey * (np.asarray(half_mask())[..., None] < 128)).permute(2, 0, 1)[None]
    theirs = pipe(PROMPTS[:2], image=encode_picture(inpainting, picture()), mask_image=half_mask(), strength=strength, num_inference_steps=5,
                  masked_image_latents=inpainting.vae.encode(grey).latent_dist.mean * 0.9, guidance_scale=4.0,
                  generator=generators(SEEDS[:2]), output_type="latent", height=32, width=32).images
    ours = render(inpainting, PROMPTS[:2], SEEDS[:2], steps=5, output="latent", init=picture(), mask=half_mask(), strength=strength)
    agree(ours, theirs)


@pytest.mark.parametrize("kind", ["base", "inpainting"])
def test_pixels_outside_the_mask_are_the_original_s(kind, request):
    model = request.getfixturevalue(kind)
    found = np.asarray(render(model, PROMPTS[:1], [1], steps=2, init=picture(), mask=half_mask())[0])
    before = np.asarray(picture())
    assert np.array_equal(found[:, :16], before[:, :16]) and not np.array_equal(found[:, 16:], before[:, 16:])


def test_an_inpainting_model_paints_everything_without_a_mask(inpainting):
    canvas = prepare(inpainting)
    assert canvas.extra.shape == (1, 5, 16, 16) and bool((canvas.extra[:, :1] == 1).all())
    assert torch.allclose(canvas.extra[:, 1:], inpainting.vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean * 0.9, atol=1e-5)


def test_depth_is_diffusers(depth_base, monkeypatch):
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_depth2img.retrieve_latents"
    monkeypatch.setattr(module, lambda output, generator=None: output.latent_dist.mean)  # spend no draw on the picture, as we do
    depth = (np.add.outer(np.arange(32.0), 2 * np.arange(32.0)) + 7).astype(np.float32)
    pipe = diffusers.StableDiffusionDepth2ImgPipeline(
        vae=depth_base.vae, text_encoder=depth_base.text_encoder, tokenizer=depth_base.tokenizer, unet=depth_base.unet,
        scheduler=make(depth_base.scheduler_config, "dpm++"), depth_estimator=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(PROMPTS[:1], image=picture(), depth_map=torch.from_numpy(depth)[None], strength=0.6, num_inference_steps=5,
                  guidance_scale=4.0, generator=generators([3]), output_type="latent").images
    ours = render(depth_base, PROMPTS[:1], [3], steps=5, init=picture(), depth=Image.fromarray(depth), strength=0.6, output="latent")
    agree(ours, theirs)
    extra = prepare(depth_base, depth=Image.fromarray(depth)).extra
    assert float(extra.min()) == -1 and float(extra.max()) == 1 and extra.shape == (1, 1, 16, 16)


def test_depth_needs_no_picture(depth_base):
    ramp, other = (Image.fromarray(np.add.outer(np.arange(32), step * np.arange(32)).astype(np.uint8)) for step in (1, 3))
    found = [render(depth_base, PROMPTS[:1], [3], steps=2, depth=depth, output="latent")[0] for depth in (ramp, other)]
    assert (found[0] - found[1]).abs().max() > 1e-3
    with pytest.raises(Problem, match="the same everywhere"):
        prepare(depth_base, depth=Image.new("L", (32, 32), 9))
    with pytest.raises(Problem, match="no depth map was given"):
        prepare(depth_base)


@pytest.mark.parametrize(("told", "words"), [
    ({"mask": half_mask()}, "without --init-image"), ({"strength": 0.5}, "without --init-image"),
    ({"init": picture(), "strength": 1.5}, "not between 0 and 1"), ({"depth": half_mask()}, "reads no depth map"),
    ({"init": picture(), "mask": half_mask(16, 32)}, "16x32"), ({"size": (32, 35)}, "35 is no multiple of 2"),
    ({"sampler": "heun"}, "no sampler"), ({"steps": 1001}, "1001")])
def test_what_does_not_go_together_is_refused(base, told, words):
    with pytest.raises(Problem, match=words.replace("(", r"\(")):
        render(base, PROMPTS[:1], [1], **{"steps": 2, **told})
