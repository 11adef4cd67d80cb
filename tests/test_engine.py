"""Each part of the engine against plain arithmetic."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from finetune.engine import attention, convolutions, frozen, ladder, table
from finetune.engine.optimizer import InBackward
from finetune.engine.pages import freed_memory
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


@pytest.mark.parametrize("kind", ["AdamW", "AdamW8bit"])
def test_states_are_made_at_the_first_gradient_and_only_for_what_it_reaches(kind: str) -> None:
    make, more = (torch.optim.AdamW, {"fused": True}) if kind == "AdamW" else (ladder.quantizer.load("optim").AdamW8bit, {})
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(80, 80), nn.Linear(80, 80), nn.Linear(3, 3)])  # the last is never asked; large enough for 8 bits
    twin, x = copy.deepcopy(net), torch.randn(4, 80)
    plain, inside = make(net.parameters(), lr=1e-2, **more), InBackward([{"params": list(twin.parameters()), "lr": 1e-2}], make, **more)
    made: list[int] = []
    twin[1].bias.register_post_accumulate_grad_hook(lambda value: made.append(len(inside.state)))
    for _ in range(2):
        for network, optimizer in ((net, plain), (twin, inside)):
            network[1](network[0](x)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert made[0] == 6 and made[1] == 4
    theirs, mine = plain.state_dict()["state"], inside.state_dict()["state"]
    assert theirs.keys() == mine.keys() == {0, 1, 2, 3}
    for number, state in theirs.items():
        assert state.keys() == mine[number].keys()
        assert all(torch.equal(value, mine[number][key]) for key, value in state.items() if isinstance(value, torch.Tensor))
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), twin.parameters(), strict=True))


def test_stepping_in_the_backward_pass_needs_settings_that_allow_it() -> None:
    with pytest.raises(Problem, match="--step-in-backward needs --clip-norm 0"):
        LORA(step_in_backward=True)
    with pytest.raises(Problem, match="--step-in-backward needs --clip-norm 0"):
        LORA(step_in_backward=True, clip_norm=0, accumulate=2)
    assert LORA(step_in_backward=True, clip_norm=0).step_in_backward


def test_freed_memory_is_kept_or_returned_where_it_pays() -> None:
    assert [freed_memory(DREAMBOOTH(memory=rung), True) for rung in ("fast", "low", "lowest")] == ["keep", "return", "return"]
    assert freed_memory(DREAMBOOTH(memory="fast", step_in_backward=True, clip_norm=0), True) == "return"
    assert freed_memory(LORA(memory="fast"), False) == "library" and freed_memory(LORA(memory="low", freed_memory="keep"), False) == "keep"


LARGE_PIECES = """
import sys, resource
from finetune.engine.pages import set_pages
told = set_pages(sys.argv[1])
import numpy
def megabytes(): return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
before, held = megabytes(), []
for _ in range(40):  # two megabytes each, every other one freed: holes
    held += [numpy.ones(2**18), numpy.ones(2**18)]
del held[::2]
print(told, round(megabytes() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
@pytest.mark.parametrize(("mode", "told", "megabytes"), [("return", "True", 80), ("keep", "True", 160)])
def test_pages_go_back_at_once_or_stay(mode: str, told: str, megabytes: int) -> None:
    out = subprocess.run([sys.executable, "-c", LARGE_PIECES, mode], capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == told and abs(int(out[1]) - megabytes) < 30


# -- kernels ------------------------------------------------------------------------------------------------------------------

def convolution(side: int = 3, stride: int = 1, trained: bool = False) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 96, side, stride, padding=side // 2)
    return nn.Sequential(layer).requires_grad_(trained), torch.randn(2, 64, 9, 7, requires_grad=True)


def take(name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every direction takes the way of the name where it has one; returns what is asked."""
    asked: list[str] = []

    def fastest(question: str, ways: dict[str, Any], tolerance: float) -> str:
        asked.append(question)
        return name if name in ways else "plain"

    monkeypatch.setattr(convolutions, "fastest", fastest)
    return asked


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("side", "stride"), [(3, 1), (3, 2), (1, 1)])
@pytest.mark.parametrize("name", ["plain", "columns", "folded", "turned", "packed"])
def test_every_way_of_a_convolution_is_the_convolution(name: str, side: int, stride: int, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and all gradients against float64, for two batch sizes and two shapes with one choice."""
    take(name, monkeypatch)
    net, x = convolution(side, stride, trained)
    exact = copy.deepcopy(net).double()
    assert convolutions.quicken(net) == 1
    for some in (x, x[:1, :, :5, :6].detach().clone().requires_grad_()):
        wide = some.detach().double().requires_grad_()
        found, right = net(some), exact(wide)
        assert found.is_contiguous() and found.shape == right.shape
        grad = torch.randn_like(found)
        found.backward(grad)
        right.backward(grad.double())
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(some.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(net.parameters(), exact.parameters(), strict=True):
        assert (mine.grad is not None) is trained
        if trained:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-4)


def test_a_frozen_weight_is_let_go_when_no_direction_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, let_go in (("packed", True), ("turned", False), ("columns", False)):  # turned and columns: the other direction reads it
        take(name, monkeypatch)
        net, x = convolution()
        convolutions.quicken(net)
        out = net(x)
        assert not net[0].weight.is_meta  # until the backward pass has chosen
        out.sum().backward()
        assert net[0].weight.is_meta is let_go


def test_a_weight_inside_an_adapter_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA takes the norm of the weight at every step."""
    import peft

    take("packed", monkeypatch)
    net, x = convolution()
    right = net(x).detach()
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(r=2, use_dora=True, target_modules=["0"]), net)
    convolutions.quicken(wrapped)
    for _ in range(2):
        found = wrapped(x)
        found.sum().backward()
    torch.testing.assert_close(found.detach(), right, rtol=1e-4, atol=1e-4)


def test_directions_are_chosen_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = take("columns", monkeypatch)
    net, x = convolution(stride=2)
    convolutions.quicken(net)
    net(x.detach())  # below the first adapter nothing goes back
    assert asked == ["conv3x3 every 2 64-96 (9, 7) x2 ahead"]
    net(x).sum().backward()
    assert asked[1:] == ["conv3x3 every 2 64-96 (9, 7) x2 back"]
    net, x = convolution(trained=True)
    convolutions.quicken(net)
    net(x.detach()).sum().backward()
    assert asked[2:] == ["conv3x3 64-96 (9, 7) x2 ahead trained", "conv3x3 64-96 (9, 7) x2 weight trained"]


def test_ways_that_are_wrong_or_gone_are_not_taken(own_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*given: object) -> None:
        raise RuntimeError("no such operator")

    def wrong(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros(len(x), 96 if x.shape[1] == 64 else 64, *x.shape[2:])

    monkeypatch.setattr(table, "_seconds", lambda work: work() is None or 1.0)
    for name, stand_in in (("reorder", gone), ("run", wrong)):
        with monkeypatch.context() as patch:
            patch.setattr(table, "_known", {})
            patch.setattr(convolutions, name, stand_in)
            net, x = convolution()
            convolutions.quicken(net)
            net(x).sum().backward()
            assert len(table._table()) == 2 and not any("packed" in times for times in table._table().values())
            (file,) = (own_table / "kernels").iterdir()
            file.unlink()


def test_what_is_not_a_plain_convolution_of_many_channels_stays() -> None:
    others = [nn.Conv2d(64, 64, 3, padding=1, stride=3), nn.Conv2d(64, 64, 1, groups=2), nn.Conv2d(8, 64, 3, padding=1), nn.Linear(64, 64),
              nn.Conv2d(64, 64, 3, padding=1, dtype=torch.bfloat16)]
    assert convolutions.quicken(nn.ModuleList(others)) == 0


def test_the_table_is_measured_once_and_kept(own_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fastest(question: str, *seconds: float) -> str:
        times = dict(zip(("plain", "other", "third"), seconds, strict=False))
        ways = {name: lambda name=name: torch.ones(1) for name in times}
        monkeypatch.setattr(table, "_measure", lambda ways, tolerance: times)
        return table.fastest(question, ways, 0)

    assert fastest("half", 1.0, 0.5) == "other" and fastest("about the same", 1.0, 0.97) == "plain" and fastest("three", 1.0, 0.9, 0.8) == "third"
    monkeypatch.setattr(table, "_known", {})  # another process
    assert fastest("half", 1.0, 2.0) == "other" and fastest("about the same", 1.0, 0.1) == "plain"
    assert fastest("three", 1.0, 0.9) == "other"  # what was fastest is no way of this question any more
    (file,) = (own_table / "kernels").iterdir()
    file.write_text("not json", encoding="utf-8")
    monkeypatch.setattr(table, "_known", {})
    assert fastest("half", 1.0, 1.0) == "plain"


def test_ways_take_turns_and_the_hopeless_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def seconds(work: Callable[[], torch.Tensor]) -> float:
        timed.append("abc"[int(work()) - 1])
        return {"a": 3.0, "b": 1.0, "c": 9.0}[timed[-1]]

    monkeypatch.setattr(table, "_seconds", seconds)
    ways = {name: lambda number=number: torch.tensor(float(number)) for number, name in enumerate("abc", start=1)}
    assert table._measure(ways, 1e9) == {"a": 3.0, "b": 1.0, "c": 9.0}
    assert "".join(timed) == "abc" + "b" * (table.ROUNDS - 1)


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
    for answer in ("chunked", "sdpa"):
        monkeypatch.setattr(attention, "fastest", lambda question, ways, tolerance, answer=answer: asked.append(question) or answer)
        assert attention.Plain("auto")._in_chunks(*parts) is (answer == "chunked")
    assert len(asked) == 2
    assert not attention.Plain("auto")._in_chunks(*(part.float() for part in parts)) and len(asked) == 2
    assert attention.Plain("chunked")._in_chunks(*parts) and not attention.Plain("sdpa")._in_chunks(*parts)
