"""Each part of the engine against plain arithmetic."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from finetune.engine import attention, frozen, ladder, packed, table
from finetune.engine.optimizer import InBackward
from finetune.engine.pages import keep_pages
from finetune.errors import Problem
from finetune.methods import get

LORA, DREAMBOOTH = get("lora").Settings, get("dreambooth").Settings


@pytest.fixture
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of kernels of this test's own."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(table, "_known", {})
    return tmp_path


# -- the ladder ---------------------------------------------------------------------------------------------------------------

def test_rungs_change_what_was_not_given() -> None:
    plain = LORA(batch_size=4)
    assert ladder.apply(plain, "fast", whole=False).model_dump() == plain.model_dump() | {"memory": "fast"}
    low, lowest = (ladder.apply(plain, rung, whole=False) for rung in ("low", "lowest"))
    assert (low.frozen, low.gradient_checkpointing, low.batch_size) == ("bf16", False, 4)
    assert (lowest.frozen, lowest.gradient_checkpointing, lowest.batch_size, lowest.accumulate) == ("4bit", True, 1, 4)
    assert ladder.apply(LORA(frozen="fp32"), "lowest", whole=False).frozen == "fp32"  # given stays
    assert ladder.apply(LORA(batch_size=4, accumulate=2), "lowest", whole=False).batch_size == 4
    whole = ladder.apply(DREAMBOOTH(), "low", whole=True)
    assert (whole.optimizer, whole.frozen) == ("adamw8bit", "auto")
    assert len(ladder.described(plain, lowest)) == 3 and not ladder.described(plain, ladder.apply(plain, "fast", whole=False))


def test_without_bitsandbytes_the_ladder_stays_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder.quantizer, "available", lambda: False)
    assert ladder.apply(LORA(), "lowest", whole=False).frozen == "bf16"
    assert ladder.apply(DREAMBOOTH(), "lowest", whole=True).optimizer == "adamw"


# -- frozen weights -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layer", [nn.Linear(12, 7), nn.Linear(12, 7, bias=False), nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.Conv2d(6, 8, 1)])
def test_stored_layers_compute_with_their_rounded_weights(layer: nn.Module) -> None:
    x = torch.randn(2, 5, 12) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 10, 10)
    wanted = copy.deepcopy(layer).double()
    wanted.weight.data = layer.weight.data.bfloat16().double()
    holder = nn.Sequential(layer).requires_grad_(False)
    frozen.store(holder, LORA(frozen="bf16"))
    assert holder[0].weight.dtype == torch.bfloat16 and isinstance(holder[0], (nn.Linear, nn.Conv2d))
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    found, right = holder(ours), wanted(theirs)
    grad = torch.randn_like(found)
    found.backward(grad)
    right.backward(grad.double())
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


def test_a_stored_layer_keeps_no_cast_weight() -> None:
    layer = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    frozen.store(layer, LORA(frozen="bf16"))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        layer(torch.randn(3, 64, requires_grad=True))
    assert [value.dtype for value in kept] == [torch.bfloat16]


def test_formats_follow_the_precision() -> None:
    assert frozen.format_of(LORA()) == "fp32" and frozen.weights_dtype(LORA()) == torch.float32
    assert frozen.format_of(LORA(precision="bf16")) == "bf16" and frozen.weights_dtype(LORA(precision="fp16")) == torch.float16
    assert frozen.weights_dtype(LORA(frozen="4bit")) == torch.bfloat16
    half = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    frozen.store(half, LORA(precision="bf16"))
    assert type(half[0]) is nn.Linear and half[0].weight.dtype == half[0].bias.dtype == torch.bfloat16


@pytest.mark.parametrize(("wanted", "tolerance"), [("8bit", 0.03), ("4bit", 0.15)])
def test_quantized_linear_layers_are_near_and_small(wanted: str, tolerance: float) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"one": nn.Linear(128, 128), "conv": nn.Conv2d(4, 4, 3)}).requires_grad_(False)
    x = torch.randn(16, 128, requires_grad=True)
    right = net["one"](x)
    plain = net["one"].weight.numel() * 4
    frozen.store(net, LORA(frozen=wanted))
    found = net["one"](x)
    assert (found - right).norm().item() / right.norm().item() < tolerance
    assert net["one"].weight.numel() * net["one"].weight.element_size() <= plain / 4
    assert type(net["conv"]) is frozen.StoredConv2d
    found.sum().backward()
    assert torch.isfinite(x.grad).all()
    with pytest.raises(Problem, match="--frozen .bit does not go with --variant dora"):
        frozen.store(nn.Sequential(nn.Linear(8, 8)), LORA(frozen=wanted, variant="dora"))


# -- the optimizer in the backward pass ---------------------------------------------------------------------------------------

def test_steps_in_the_backward_pass_are_the_same_steps() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
    twin = copy.deepcopy(net)

    def groups(network: nn.Module) -> list[dict]:
        return [{"params": [network[0].weight, network[0].bias], "lr": 1e-2, "weight_decay": 0.1}, {"params": list(network[2].parameters()), "lr": 3e-3}]

    plain, inside = torch.optim.AdamW(groups(net), fused=True), InBackward(groups(twin), torch.optim.AdamW, fused=True)
    for step in range(6):
        if step == 3:  # a checkpoint of the one continues as the other
            twin.load_state_dict(net.state_dict())
            inside.load_state_dict(copy.deepcopy(plain.state_dict()))
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        for network, optimizer in ((net, plain), (twin, inside)):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            network(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(value.grad is None for value in twin.parameters()) and inside.trouble() == 0
        assert all(torch.equal(one, other) for one, other in zip(net.parameters(), twin.parameters(), strict=True))
    before = [value.clone() for value in twin.parameters()]
    (twin(x).sum() * float("nan")).backward()
    assert inside.trouble().isnan() and inside.trouble() == 0 and all(torch.equal(one, other) for one, other in zip(before, twin.parameters(), strict=True))


def test_stepping_in_the_backward_pass_needs_settings_that_allow_it() -> None:
    with pytest.raises(Problem, match="--step-in-backward needs --clip-norm 0"):
        LORA(step_in_backward=True)
    with pytest.raises(Problem, match="--step-in-backward needs --clip-norm 0"):
        LORA(step_in_backward=True, clip_norm=0, accumulate=2)
    assert LORA(step_in_backward=True, clip_norm=0).step_in_backward


def test_pages_are_kept_on_linux() -> None:
    assert keep_pages() is (__import__("sys").platform == "linux")


# -- kernels ------------------------------------------------------------------------------------------------------------------

def convolution(side: int = 3) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(64, 96, side, padding=side // 2)).requires_grad_(False), torch.randn(2, 64, 9, 7, requires_grad=True)


@pytest.mark.parametrize("side", [3, 1])
def test_packed_convolutions_are_convolutions(side: int, own_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "faster", lambda *question: True)
    net, x = convolution(side)
    exact = copy.deepcopy(net).double()
    assert packed.pack(net) == 1
    found = net(x)
    assert type(net[0]) is (packed.PackedConv2d if side == 3 else packed.ProductConv2d) and net[0].weight.is_meta is (side == 3)
    wide = x.detach().double().requires_grad_()
    right, grad = exact(wide), torch.randn(2, 96, 9, 7)
    found.backward(grad)
    right.backward(grad.double())
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net(x[:1, :, :5, :5]).double(), exact(wide[:1, :, :5, :5]), rtol=1e-5, atol=1e-5)  # any other size too


def test_packing_falls_back_where_it_is_slower_wrong_or_gone(own_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*given: object) -> None:
        raise RuntimeError("no such operator")

    def wrong(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros(len(x), 96 if x.shape[1] == 64 else 64, *x.shape[2:])

    for name, stand_in in (("faster", lambda *question: False), ("reorder", gone), ("run", wrong)):
        with monkeypatch.context() as patch:
            patch.setattr(packed, "faster", lambda *question: True)
            patch.setattr(packed, name, stand_in)
            net, x = convolution()
            right = net(x).detach()
            packed.pack(net)
            assert torch.equal(net(x), right) and type(net[0]) is nn.Conv2d and not net[0].weight.is_meta


def test_what_trains_or_is_not_a_plain_convolution_is_not_packed() -> None:
    trained = nn.Conv2d(64, 64, 3, padding=1)
    others = [nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.Conv2d(64, 64, 1, groups=2), nn.Conv2d(8, 64, 3, padding=1), nn.Linear(64, 64)]
    assert packed.pack(nn.ModuleList([trained, *(layer.requires_grad_(False) for layer in others)])) == 0


def test_the_table_is_measured_once_and_kept(own_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 0.5, 1.0, 0.97])
    monkeypatch.setattr(table, "_best", lambda work: next(times))
    assert table.faster("half", print, print) and not table.faster("about the same", print, print)
    monkeypatch.setattr(table, "_known", {})  # another process
    assert table.faster("half", print, print) and not table.faster("about the same", print, print)
    (file,) = (own_table / "kernels").iterdir()
    file.write_text("not json", encoding="utf-8")
    monkeypatch.setattr(table, "_known", {})
    monkeypatch.setattr(table, "_best", lambda work: 1.0)
    assert not table.faster("half", print, print)


@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (128, 77), (5, 1)])
def test_chunked_attention_is_attention(queries: int, keys: int) -> None:
    query, key, value = (torch.randn(2, 3, count, 8, dtype=torch.float64, requires_grad=True) for count in (queries, keys, keys))
    ours, torchs = attention.Chunked.apply(query, key, value), F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(ours, torchs)
    grad = torch.randn_like(ours)
    for one, other in zip(torch.autograd.grad(ours, (query, key, value), grad), torch.autograd.grad(torchs, (query, key, value), grad), strict=True):
        torch.testing.assert_close(one, other)


def test_chunks_are_taken_where_they_are_faster(own_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [torch.randn(1, 2, 40, 8, dtype=torch.bfloat16) for _ in range(3)]
    asked: list[str] = []
    for answer in (True, False):
        monkeypatch.setattr(attention, "faster", lambda question, *ways, answer=answer: asked.append(question) or answer)
        assert attention.Plain("auto")._in_chunks(*parts) is answer
    assert len(asked) == 2
    assert not attention.Plain("auto")._in_chunks(*(part.float() for part in parts)) and len(asked) == 2
    assert attention.Plain("chunked")._in_chunks(*parts) and not attention.Plain("sdpa")._in_chunks(*parts)
