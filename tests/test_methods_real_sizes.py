"""The real Stable Diffusion configurations, without weights: what trains is as many numbers as is published."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finetune import methods
from finetune.errors import Problem
from finetune.model import configs
from finetune.model.base import Base


def base_of(family: str) -> Base:
    """A base of real shapes on the meta device: no memory, no weights."""
    told = configs.parts_of(family)
    with torch.device("meta"):
        parts = {"unet": UNet2DConditionModel.from_config(told["unet"]), "vae": AutoencoderKL.from_config(told["vae"]),
                 "text_encoder": CLIPTextModel(text_config(told["text_encoder"]))}
        if family == "sdxl":
            parts["text_encoder_2"] = CLIPTextModelWithProjection(text_config(told["text_encoder_2"]))
    return Base(name=family, location=SimpleNamespace(family=family), **parts, tokenizer=None, scheduler_config={}, schedule=torch.ones(10),
                prediction="epsilon", hash="0" * 16, device=torch.device("meta"), resolution=512)


def text_config(told: dict[str, Any]) -> CLIPTextConfig:
    return CLIPTextConfig(**{key: value for key, value in told.items() if key not in ("architectures", "model_type")})


def trained(name: str, family: str, **own: Any) -> tuple[int, Any, Base]:
    base = base_of(family)
    method = methods.get(name)(methods.get(name).Settings(class_noun="dog", **own))
    base.freeze()
    groups = method.attach(base)
    return sum(value.numel() for group in groups for value in group.parameters.values()), method, base


@pytest.mark.parametrize(("family", "unet", "text"), [
    ("sd1", 859_520_964, [123_060_480]), ("sd2", 865_910_724, [340_387_840]), ("sdxl", 2_567_463_684, [123_060_480, 694_659_840])])
def test_configurations_have_the_published_sizes(family: str, unet: int, text: list[int]) -> None:
    base = base_of(family)
    assert sum(value.numel() for value in base.unet.parameters()) == unet
    assert [sum(value.numel() for value in encoder.parameters()) for _, encoder, _ in base.encoders()] == text
    assert sum(value.numel() for value in base.vae.parameters()) == 83_653_863


@pytest.mark.parametrize(("family", "targets", "per_rank", "modules"), [
    ("sd1", "cross-attention", 99_456, 64), ("sd1", "attention", 199_296, 128), ("sd1", "transformer", 423_936, 192),
    ("sd2", "cross-attention", 107_648, 64), ("sd2", "attention", 207_488, 128), ("sd2", "transformer", 432_128, 192),
    ("sdxl", "cross-attention", 785_920, 280), ("sdxl", "attention", 1_451_520, 560), ("sdxl", "transformer", 2_659_840, 722)])
def test_lora_trains_the_published_number(family: str, targets: str, per_rank: int, modules: int) -> None:
    count, method, base = trained("lora", family, rank=4, targets=targets)
    assert count == 4 * per_rank
    assert sum("default" in getattr(layer, "lora_A", {}) for layer in base.unet.modules()) == modules
    assert method.expected_bytes(base) == 2 * 2 * 4 * per_rank  # two layouts in half precision


@pytest.mark.parametrize(("family", "scope", "transform", "count"), [
    ("sd1", "all", "key,value", 21_939_840), ("sd2", "all", "key,value", 25_611_392),
    ("sd1", "cross", "key,value", 4_723_200), ("sd2", "cross", "key,value", 8_394_752), ("sdxl", "all", "key,value", 49_962_240)])
def test_hypernetwork_trains_the_published_number(family: str, scope: str, transform: str, count: int) -> None:
    found, _, base = trained("hypernetwork", family, scope=scope, transform=transform)
    assert found == count


def test_key_and_query_widths() -> None:
    """One network for the text width, and one query network for each width of the hidden states."""
    _, method, _ = trained("hypernetwork", "sd1", transform="key,query")
    assert sorted(method.networks) == ["1280_query", "320_query", "640_query", "768_key"]


def test_dreambooth_trains_the_whole_unet() -> None:
    count, method, base = trained("dreambooth", "sd1")
    assert count == 859_520_964
    assert method.expected_bytes(base) == 2 * (859_520_964 + 123_060_480 + 83_653_863)


def test_refusals_name_value_and_remedy() -> None:
    with pytest.raises(Problem, match=r"--rank 512 is larger than the narrowest chosen layer, which is 320 wide.*Use --rank 320 or less"):
        trained("lora", "sd1", rank=512)
    with pytest.raises(Problem, match=r"--targets 'nothing' matches no layer.*to_k,to_v"):
        trained("lora", "sd1", targets="nothing")
    with pytest.raises(Problem, match=r"--transform 'key,keys' is not a choice"):
        trained("hypernetwork", "sd1", transform="key,keys")
    with pytest.raises(Problem, match=r"--layer-structure '2,1' is not a list of multiples"):
        trained("hypernetwork", "sd1", layer_structure="2,1")
    with pytest.raises(Problem, match=r"No class noun.*--class-noun"):
        _ = methods.get("lora")(methods.get("lora").Settings()).subject
    with pytest.raises(Problem, match=r"There is no method 'lorra'.*'lora'"):
        methods.get("lorra")
