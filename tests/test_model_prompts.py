"""Prompts: brackets, weights, chunks, CLIP skip, against the web UI's arithmetic written again and transformers itself."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import webui

from finetune.errors import Problem
from finetune.model import prompts
from finetune.model.base import Base, load
from finetune.model.text import add_tokens, encode

SHORT = ["a photo of a cat", "", "two dogs, red hat", "unheardof wörds 🐈 in it"]


@pytest.fixture(scope="module")
def opened(tiny_model: Path) -> Base:
    """Read once; do not change it."""
    return load(str(tiny_model))


@pytest.fixture
def base(opened: Base) -> Base:
    """With a shifted final norm: an untrained one leaves states whose mean is only rounding."""
    base = copy.deepcopy(opened)
    base.text_encoder.final_layer_norm.bias.data += torch.linspace(-0.2, 0.5, base.text_encoder.config.hidden_size)
    return base


def openclip(base: Base) -> Base:
    """Padding with another token than the end, as SD 2's and SDXL's second tokenizer do."""
    base.tokenizer = copy.deepcopy(base.tokenizer)
    base.tokenizer.pad_token = "!"
    assert base.tokenizer.pad_token_id != base.tokenizer.eos_token_id
    return base


def sdxl(base: Base) -> Base:
    """Two encoders side by side, the second with a projection and padding of its own."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(**{**base.text_encoder.config.to_dict(), "hidden_size": 32, "num_hidden_layers": 3, "projection_dim": 24})
    with torch.random.fork_rng():
        torch.manual_seed(4)
        base.text_encoder_2 = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
    base.tokenizer_2 = copy.deepcopy(base.tokenizer)
    base.tokenizer_2.pad_token = "!"
    return base


KINDS = {"sd1": lambda base: base, "sd2": openclip, "sdxl": sdxl}


# -- brackets ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "pieces"), [
    ("plain text", [("plain text", 1.0)]),
    ("", [("", 1.0)]),
    ("()", [("", 1.0)]),
    ("a (b) c", [("a ", 1.0), ("b", 1.1), (" c", 1.0)]),
    ("a [b] c", [("a ", 1.0), ("b", 1 / 1.1), (" c", 1.0)]),
    ("(b:1.3)", [("b", 1.3)]),
    ("(b: 1.3 )", [("b", 1.3)]),
    ("(b:-.5)", [("b", -0.5)]),
    ("((b))", [("b", 1.1 * 1.1)]),
    ("((b:2) c)", [("b", 2 * 1.1), (" c", 1.1)]),
    ("[b:1.3]", [("b:1.3", 1 / 1.1)]),  # only round brackets take a weight
    ("(a)(b)", [("ab", 1.1)]),
    ("(a", [("a", 1.1)]),
    ("(a [b", [("a ", 1.1), ("b", 1.1 * (1 / 1.1))]),
    ("a) b] :1.2)", [("a) b] :1.2)", 1.0)]),
    (r"a \(b\) \[c\] \\ d", [(r"a (b) [c] \ d", 1.0)]),
    (r"\(a:1.2)", [("(a:1.2)", 1.0)]),
    ("(a:1.2.3)", [("a:1.2.3", 1.1)]),  # no number: the web UI stops with an error here
    ("(a:b:2)", [("a:b", 2.0)]),
    ("a BREAK b", [("a", 1.0), ("BREAK", -1.0), ("b", 1.0)]),
    ("(a BREAK b:2)", [("a", 2.0), ("BREAK", -1.0), ("b", 2.0)]),
    ("aBREAK BREAKER", [("aBREAK BREAKER", 1.0)]),
    ("BREAK BREAK", [("BREAK", -1.0), ("BREAK", -1.0)]),
])
def test_brackets(text: str, pieces: list[tuple[str, float]]) -> None:
    assert prompts.parse(text) == pieces


def test_brackets_as_read_letter_by_letter() -> None:
    letters = random.Random(1)
    for _ in range(4000):
        text = "".join(letters.choice(["a", "b ", "(", ")", "[", "]", ":", ":1.5)", ":0.25", ": 2 )", "\\", "\\(", ".", "-1", "é", "\n"])
                       for _ in range(letters.randrange(14)))
        found = [(letter, weight) for piece, weight in prompts.parse(text) for letter in piece]
        assert found == webui.attention(text), text


def test_plain_text_comes_back_and_nothing_crashes() -> None:
    letters = random.Random(2)
    for _ in range(2000):
        text = "".join(chr(letters.choice([letters.randrange(32, 127), letters.randrange(0x3000), letters.randrange(0x110000)]))
                       for _ in range(letters.randrange(12)))
        pieces = prompts.parse(text)
        assert pieces and all(isinstance(piece, str) and isinstance(weight, float) for piece, weight in pieces)
        if not set(text) & set("()[]\\"):
            assert pieces == [(text, 1.0)]
        escaped = "".join(f"\\{sign}" if sign in "()[]\\" else sign for sign in text)
        assert prompts.parse(escaped) == [(text, 1.0)]


# -- short prompts -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_short_and_unweighted_is_what_encode_says_to_the_bit(base: Base, kind: str) -> None:
    base = KINDS[kind](base)
    found, negatives = prompts.encode_weighted(base, SHORT, ["", "ugly, blurry"])
    for cond, texts in ((found, SHORT), (negatives, ["", "ugly, blurry"])):
        wanted = encode(base, texts)
        assert torch.equal(cond.states, wanted.states)
        assert (cond.pooled is None) == (kind != "sdxl")
        assert kind != "sdxl" or torch.equal(cond.pooled, wanted.pooled)


def test_a_learned_word_of_several_rows_reads_as_in_training(base: Base) -> None:
    add_tokens(base, "[v:1.2)", torch.randn(3, base.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(0)))
    text = "a photo of [v:1.2) in snow"  # its brackets are part of the word
    found, _ = prompts.encode_weighted(base, [text], [""])
    assert torch.equal(found.states, encode(base, [text]).states)
    weighted, _ = prompts.encode_weighted(base, ["a photo of ([v:1.2):1.5) in snow"], [""])
    factors = np.ones(32)
    factors[4:7] = 1.5  # start, three words, then the three rows
    np.testing.assert_allclose(weighted.states[0].numpy(), webui.emphasis(encode(base, [text]).states[0].detach().numpy(), factors), atol=2e-6)


# -- weights -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_weights_multiply_and_the_mean_stays(base: Base, kind: str) -> None:
    base = KINDS[kind](base)
    plain = encode(base, ["a red cat", "two toy"])
    found, negatives = prompts.encode_weighted(base, ["a (red:1.5) [cat]", "two toy"], ["(two toy:0.5)", ""])
    widths = [encoder.config.hidden_size for _, encoder, _ in base.encoders()]
    for cond, row, factors, source in ((found, 0, {2: 1.5, 3: 1 / 1.1}, 0), (negatives, 0, {1: 0.5, 2: 0.5}, 1)):
        weights = np.ones(base.tokenizer.model_max_length)
        weights[list(factors)] = list(factors.values())
        wanted = [webui.emphasis(part.numpy(), weights) for part in plain.states[source].split(widths, dim=-1)]
        np.testing.assert_allclose(cond.states[row].numpy(), np.concatenate(wanted, axis=-1), atol=2e-6)
        if kind == "sdxl":  # weights do not reach the pooled state
            torch.testing.assert_close(cond.pooled[row], plain.pooled[source], atol=2e-6, rtol=0)
    assert torch.equal(found.states[1], plain.states[1])  # a neighbour's weights do not reach a plain prompt


def test_a_mean_that_is_only_rounding_is_not_restored(tiny_model: Path) -> None:
    base = load(str(tiny_model))
    plain = encode(base, ["a red cat"]).states[0]
    assert abs(plain.double().mean()) < 1e-7
    found, _ = prompts.encode_weighted(base, ["a (red:1.5) cat"], [""])
    plain[2] *= 1.5
    assert torch.equal(found.states[0], plain)


def test_weights_that_are_no_numbers_are_refused(base: Base) -> None:
    with pytest.raises(Problem, match="beyond any number"):
        prompts.encode_weighted(base, [f"(a:1{'0' * 400})"], [""])


# -- chunks ------------------------------------------------------------------------------------------------------------

def random_units(base: Base, seed: int) -> tuple[str, list[tuple[int, ...] | None]]:
    """A prompt of words, commas, BREAKs and a learned word, and the tokens of each."""
    draws = random.Random(seed)
    words = draws.choices(["cat", "red", ",", "<w>", "BREAK"], [8, 8, 3, 1, 0.2], k=draws.randrange(150))
    tokenizer = base.tokenizer
    spelled = {"<w>": [f"<w>{end}" for end in ("", "_1", "_2")], ",": [",</w>"], "cat": ["cat</w>"], "red": ["red</w>"]}
    return " ".join(words), [None if word == "BREAK" else tuple(tokenizer.convert_tokens_to_ids(spelled[word])) for word in words]


def test_long_prompts_are_cut_where_the_web_ui_cuts_them(base: Base) -> None:
    add_tokens(base, "<w>", torch.zeros(3, base.text_encoder.config.hidden_size))
    comma = base.tokenizer.convert_tokens_to_ids(",</w>")
    moved = 0
    for length in (32, 77):
        base.tokenizer.model_max_length = length
        for seed in range(150):
            text, units = random_units(base, seed)
            wanted = webui.chunks(units, comma, room=length - 2)
            found = [chunk.ids for chunk in prompts._chunks(base, base.tokenizer, text)]
            assert found == wanted, text
            assert prompts.count(base, text) == (sum(map(len, wanted)), len(wanted))
            moved += wanted != webui.chunks(units, -1, room=length - 2)
    assert moved > 50  # otherwise commas were not tested
    assert prompts.chunk_length(base) == 75


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_independent_encodings_side_by_side(base: Base, kind: str) -> None:
    base = KINDS[kind](base)
    room = prompts.chunk_length(base)
    first, second = " ".join(["cat", "red"] * (room // 2)), "a (blue:1.4) dog"
    found, negatives = prompts.encode_weighted(base, [f"{first} {second}"], ["ugly"])
    parts = [prompts.encode_weighted(base, [text], [""])[0] for text in (first, second)]
    assert torch.equal(found.states, torch.cat([part.states for part in parts], dim=1))
    assert torch.equal(negatives.states, torch.cat([encode(base, ["ugly"]).states, encode(base, [""]).states], dim=1))
    if kind == "sdxl":
        assert torch.equal(found.pooled, parts[0].pooled) and torch.equal(negatives.pooled, encode(base, ["ugly"]).pooled)
    broken, _ = prompts.encode_weighted(base, [f"cat BREAK {second}"], [""])
    assert torch.equal(broken.states, torch.cat([encode(base, ["cat"]).states, parts[1].states], dim=1))


def test_a_long_negative_lengthens_the_prompt_too(base: Base) -> None:
    found, negatives = prompts.encode_weighted(base, ["cat"], ["cat " * 70])
    assert found.states.shape == negatives.states.shape == (1, 3 * 32, 48)
    assert torch.equal(found.states[:, 32:64], encode(base, [""]).states)


def test_a_learned_word_longer_than_a_chunk_is_read_on(base: Base) -> None:
    add_tokens(base, "<w>", torch.zeros(31, base.text_encoder.config.hidden_size))
    assert prompts.count(base, "cat <w>") == (32, 2)


# -- CLIP skip ---------------------------------------------------------------------------------------------------------

def test_clip_skip_takes_an_earlier_layer_through_the_final_norm(base: Base) -> None:
    ids = base.tokenizer(["a red cat"], padding="max_length", max_length=32, return_tensors="pt").input_ids
    network = base.text_encoder
    mask = torch.full((32, 32), float("-inf")).triu(1)[None, None]
    hidden = network.embeddings(input_ids=ids)
    layers = []
    for layer in network.encoder.layers:
        hidden = layer(hidden, attention_mask=mask)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        layers.append(network.final_layer_norm(hidden))
    for skip in (1, 2):
        found, _ = prompts.encode_weighted(base, ["a red cat"], [""], clip_skip=skip)
        torch.testing.assert_close(found.states, layers[-skip], atol=2e-6, rtol=0)
    assert not torch.allclose(layers[-1], layers[-2], atol=1e-3)
    for skip in (0, -2, 3):
        with pytest.raises(Problem, match="has 2 layers"):
            prompts.encode_weighted(base, ["a"], [""], clip_skip=skip)


def test_clip_skip_of_sdxl_counts_from_the_end_and_starts_at_its_own_layer(base: Base) -> None:
    sdxl(base)
    once, twice = (prompts.encode_weighted(base, ["a red cat"], [""], clip_skip=skip)[0] for skip in (1, 2))
    assert torch.equal(once.states, twice.states)
    base.text_encoder.config.num_hidden_layers = 3  # only to let the check pass; the first encoder has two
    with torch.no_grad():
        ids = base.tokenizer_2(["a red cat"], padding="max_length", max_length=32, return_tensors="pt").input_ids
        third = base.text_encoder_2(ids, output_hidden_states=True).hidden_states[-3]
    found, _ = prompts.encode_weighted(base, ["a red cat"], [""], clip_skip=3)
    assert torch.equal(found.states[..., 48:], third)
