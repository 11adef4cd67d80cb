"""SDXL's shape: two text encoders, a pooled state and the picture's size, held against diffusers' own SDXL pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from finetune import methods
from finetune.errors import Problem
from finetune.formats.header import read_header
from finetune.model import load
from finetune.model.base import Base
from finetune.model.conditioning import Cond
from finetune.model.text import add_tokens, encode, encode_cached, token_ids

PROMPTS = ["a photo of a red mug", "a blue cat on the beach"]


@pytest.fixture
def base(tiny_xl_model: Path) -> Base:
    return load(str(tiny_xl_model))


@pytest.fixture
def pipe(tiny_xl_model: Path) -> Any:
    """diffusers' own, from the folder."""
    return StableDiffusionXLPipeline.from_pretrained(tiny_xl_model, local_files_only=True, add_watermarker=False)


def told(pipe: Any, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """States and pooled states by diffusers."""
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    return states, pooled


def test_states_are_the_pipelines(base: Base, pipe: Any) -> None:
    states, pooled = told(pipe, PROMPTS)
    live, cached = encode(base, PROMPTS), encode_cached(base, [*PROMPTS, PROMPTS[0]])
    assert (live.states.shape[-1], live.pooled.shape) == (24 + 56, (2, 16))
    assert torch.equal(live.states, states) and torch.equal(live.pooled, pooled)
    torch.testing.assert_close(cached[:2].states, states)
    assert torch.equal(cached[2:].pooled, cached[:1].pooled) and base.states.keys() == set(PROMPTS)


@pytest.mark.parametrize("size", [None, (24, 56), 64])
def test_the_networks_word_is_the_pipelines(size: Any, base: Base, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pipeline asks its UNet at its first step, asked by Base.ask, gives the same; size goes in as height and width."""
    height, width = {None: (32, 32), 64: (64, 64)}.get(size, size)
    asked: dict[str, Any] = {}

    class Enough(Exception):
        pass

    def watched(sample: torch.Tensor, timestep: torch.Tensor, **more: Any) -> Any:
        asked.update(sample=sample, timestep=timestep, **more)
        raise Enough

    real = pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", watched)
    with pytest.raises(Enough):
        pipe(PROMPTS[0], height=height, width=width, num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(1))
    given = asked["added_cond_kwargs"]
    assert given["time_ids"].tolist() == [[height, width, 0, 0, height, width]]
    with torch.no_grad():
        theirs = real(**{key: value for key, value in asked.items() if key != "return_dict"}).sample
        ours = base.ask(asked["sample"], asked["timestep"], encode(base, PROMPTS[:1]), size=size)
        other = base.ask(asked["sample"], asked["timestep"], encode(base, PROMPTS[:1]), size=(height, width + 200))
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, other, atol=1e-6)


def test_extra_channels_follow_the_latents(base: Base) -> None:
    noisy, extra, cond = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 16, 16).double(), encode(base, PROMPTS)
    found = base.question(noisy, torch.tensor([1, 2]), cond, extra=extra)
    assert torch.equal(found["sample"], torch.cat([noisy, extra.float()], 1))


def test_cond_is_cut_joined_and_repeated_as_one() -> None:
    cond = Cond(torch.arange(12.0).reshape(2, 3, 2), torch.arange(4.0).reshape(2, 2))
    assert len(cond) == 2
    again = Cond.cat([cond[1:], cond[:1], cond[1:].expand(2)]).to(torch.float64)
    assert again.states.dtype == again.pooled.dtype == torch.float64
    assert again.pooled.tolist() == [[2, 3], [0, 1], [2, 3], [2, 3]] and torch.equal(again.states[3], cond.states[1].double())
    assert Cond.cat([Cond(cond.states), Cond(cond.states)]).pooled is None


def test_parts_are_frozen_and_named(base: Base) -> None:
    assert (base.family, base.context_width, base.resolution) == ("sdxl", 80, 32)
    assert list(base.modules()) == ["unet", "text_encoder", "text_encoder_2", "vae"]
    assert [name for name, _, _ in base.encoders()] == ["text_encoder", "text_encoder_2"]
    assert not any(value.requires_grad for module in base.modules().values() for value in module.parameters())
    assert isinstance(base.pipeline(), StableDiffusionXLPipeline) and base.pipeline().text_encoder_2 is base.text_encoder_2


def test_several_words_in_both_encoders(base: Base) -> None:
    torch.manual_seed(0)
    plain = encode(base, PROMPTS)
    table = base.text_encoder_2.get_input_embeddings().weight.clone()
    first = add_tokens(base, "<dog>", torch.randn(2, 24), torch.randn(2, 56))
    add_tokens(base, "<dog>er", torch.randn(1, 24), torch.randn(1, 56))
    assert [rows.shape for rows in first] == [(2, 24), (2, 56)]
    count = len(table)
    for _, _, tokenizer in base.encoders():
        ids = token_ids(base, ["a <dog> and a <dog>er"], tokenizer)[0].tolist()
        assert [number for number in ids if number >= count] == [count, count + 1, count + 2]
    looked = base.text_encoder_2.get_input_embeddings()(torch.tensor([count + 1, count + 2, 5]))
    assert torch.equal(looked[0], first[1][1]) and torch.equal(looked[2], table[5])
    assert torch.equal(encode(base, PROMPTS).states, plain.states)
    with pytest.raises(Problem, match="'<dog>_1' is already a word"):
        add_tokens(base, "<dog>_1", torch.randn(1, 24), torch.randn(1, 56))


def test_pooled_state_stands_at_the_end_of_the_text(tiny_xl_model: Path, base: Base, tmp_path: Path) -> None:
    """Published configurations name no end-of-text id; then transformers takes the highest id, which a learned word has."""
    shutil.copytree(tiny_xl_model, tmp_path / "old")
    config = tmp_path / "old" / "text_encoder_2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 2}))
    rows = torch.randn(1, 24), torch.randn(1, 56)
    pooled = []
    for one in (base, load(str(tmp_path / "old"))):
        add_tokens(one, "<dog>", *rows)
        pooled.append(encode(one, ["a <dog> on the beach"]).pooled)
    assert torch.equal(*pooled)


def test_words_of_other_programs(base: Base, tiny_xl_model: Path, tmp_path: Path) -> None:
    """kohya's and the web UIs' pair, and diffusers' two files, are one word; its strength goes from the mean row to the word."""
    from safetensors.torch import save_file

    rows = {"clip_l": torch.randn(2, 24), "clip_g": torch.randn(2, 56)}
    save_file(rows, tmp_path / "my-dog.safetensors")
    (tmp_path / "two").mkdir()
    for number, key in (("", "clip_l"), ("_2", "clip_g")):
        save_file({"my-dog": rows[key]}, tmp_path / "two" / f"learned_embeds{number}.safetensors")
    for place in (tmp_path / "my-dog.safetensors", tmp_path / "two", tmp_path / "two" / "learned_embeds.safetensors"):
        fresh = load(str(tiny_xl_model))
        assert methods.load_artifact(fresh, place).trigger == "my-dog"
        for (_, encoder, _), own in zip(fresh.encoders(), rows.values(), strict=True):
            assert torch.equal(encoder.get_input_embeddings().rows.data, own)
    methods.load_artifact(base, tmp_path / "my-dog.safetensors", 0.25)
    table = base.text_encoder_2.get_input_embeddings()
    middle = table.weight.mean(0)
    torch.testing.assert_close(table.rows.data, middle + 0.25 * (rows["clip_g"] - middle))


def test_a_word_of_another_family_is_refused(base: Base, tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"emb_params": torch.zeros(1, 24)}, tmp_path / "old.safetensors")
    with pytest.raises(Problem, match=r"is 24 wide, the model .* takes 24 and 56"):
        methods.load_artifact(base, tmp_path / "old.safetensors")
    save_file({"clip_l": torch.zeros(1, 24), "clip_g": torch.zeros(1, 56)}, tmp_path / "xl.safetensors")
    with pytest.raises(Problem, match=r"is 24 and 56 wide, the model .* takes 48\."):
        methods.load_artifact(load(str(tiny_model)), tmp_path / "xl.safetensors")
    save_file({"clip_l": torch.zeros(1, 24), "clip_g": torch.zeros(2, 56)}, tmp_path / "odd.safetensors")
    with pytest.raises(Problem, match=r"1 and 2 vectors"):
        methods.load_artifact(base, tmp_path / "odd.safetensors")
    assert read_header(tmp_path / "odd.safetensors").tensors.keys() == {"clip_l", "clip_g"}
