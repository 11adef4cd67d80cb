"""The sampling loop on SDXL's shape, against diffusers' SDXL pipelines."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from finetune.model import load, render
from finetune.model.canvas import encode_picture
from finetune.model.schedulers import make

PROMPTS, SEEDS = ["a photo of a dog", "a red mug"], [3, 4]


@pytest.fixture(scope="module")
def base(tiny_xl_model):
    return load(str(tiny_xl_model))


def pipeline(base, kind, sampler):
    pipe = kind(vae=base.vae, text_encoder=base.text_encoder, text_encoder_2=base.text_encoder_2, tokenizer=base.tokenizer,
                tokenizer_2=base.tokenizer_2, unet=base.unet, scheduler=make(base.scheduler_config, sampler), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def agree(ours, theirs):
    ours = torch.stack(list(ours))
    assert torch.isfinite(ours).all() and ours.std() > 0.1 and (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(("negative", "sampler", "size"), [("", "dpm++", (32, 32)), ("blurry", "euler-a", (32, 48)), ("", "unipc", (48, 32))])
def test_text_to_picture_is_diffusers(base, negative, sampler, size):
    """Without a negative prompt SDXL is guided away from zeros."""
    pipe = pipeline(base, diffusers.StableDiffusionXLPipeline, sampler)
    theirs = pipe(PROMPTS, negative_prompt=[negative] * 2 if negative else None, num_inference_steps=3, guidance_scale=5.0, height=size[0], width=size[1],
                  generator=generators(), output_type="latent").images
    agree(render(base, PROMPTS, SEEDS, steps=3, guidance=5.0, negative=negative, size=size, sampler=sampler, output="latent"), theirs)


def test_picture_to_picture_is_diffusers(base):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
    pipe = pipeline(base, diffusers.StableDiffusionXLImg2ImgPipeline, "dpm++")
    theirs = pipe(PROMPTS, image=encode_picture(base, picture).repeat(2, 1, 1, 1), strength=0.5, num_inference_steps=4, guidance_scale=5.0,
                  original_size=(32, 32), target_size=(32, 32), generator=generators(), output_type="latent").images
    agree(render(base, PROMPTS, SEEDS, steps=4, guidance=5.0, init=picture, strength=0.5, output="latent"), theirs)


def test_weighted_words_and_long_prompts_render(base):
    told = {"steps": 2, "guidance": 5.0, "output": "latent"}
    plain = render(base, PROMPTS[:1], [1], **told)[0]
    assert torch.equal(plain, render(base, PROMPTS[:1], [1], weighted=True, **told)[0])
    assert (plain - render(base, ["a photo of a (dog:1.5)"], [1], weighted=True, **told)[0]).abs().max() > 1e-4
    pair = render(base, [PROMPTS[0], "a dog, " * 40], [1, 1], weighted=True, **told)
    assert (plain - pair[0]).abs().max() < 1e-4  # a long neighbour changes nothing


def test_an_autoencoder_that_overflows_in_half_precision_works_in_float32(base):
    base.vae.to(torch.float16).register_to_config(force_upcast=True)
    try:
        found = encode_picture(base, Image.new("RGB", (32, 32), "teal"))
        assert base.vae.dtype == torch.float16 and torch.isfinite(found).all() and found.dtype == torch.float32
        assert render(base, PROMPTS[:1], [1], steps=1)[0].size == (32, 32) and base.vae.dtype == torch.float16
    finally:
        base.vae.to(torch.float32)
