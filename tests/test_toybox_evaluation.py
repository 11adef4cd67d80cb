"""Every number of `finetune toybox evaluate` comes from code that gives the right number on a case worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from finetune.cli.app import run
from finetune.errors import Problem
from finetune.evaluation.judge import TOYBOX_JUDGE
from finetune.model.dual_encoder import DualEncoder
from finetune.model.families import TOYBOX
from finetune.toybox import bars, card, encoder, evaluation, judge, text, tokenizer
from finetune.toybox.bars import Row
from finetune.toybox.captions import KINDS, full_caption
from finetune.toybox.datasets import describe, pixels
from finetune.toybox.ruler import Ruler, labels
from finetune.toybox.subjects import SUBJECTS, oracle
from finetune.toybox.world import COLOUR_NAMES, SCENE_NAMES, held_out


def quiet(sentence: str) -> None:
    """Says nothing."""


# Shares and intervals as statsmodels.stats.proportion.proportion_confint(method="wilson") gives them.
@pytest.mark.parametrize(("right", "n", "low", "high"), [
    (8, 10, 0.49016247153664183, 0.9433178485456247), (0, 10, 0.0, 0.2775327998628892), (10, 10, 0.7224672001371107, 1.0)])
def test_wilson_intervals(right, n, low, high):
    assert bars.wilson(right, n) == pytest.approx((low, high), abs=1e-9)


def test_a_bar_is_a_least_or_a_most():
    assert Row("base", "class", 0.93, 0.93, 10).met is True and Row("base", "class", 0.93, 0.929, 10).met is False
    assert Row("files", "all", 40.0, 40.1, 3, "MiB").met is False and Row("speed", "seconds a picture", 1.5, 1.4, 5, "s").met is True
    assert Row("files", "fp16", 1.0, 0.9, 3).met is False
    assert Row("held-out triples", "scene", None, 0.1, 10).met is None
    row = bars.share("base", "class", 9, 10)
    assert (row.bar, row.measured, row.n) == (0.93, 0.9, 10) and (row.low, row.high) == bars.wilson(9, 10)


def test_the_bars_are_those_that_were_asked_for():
    assert bars.BARS["autoencoder"] == {"unseen pictures": 29, "held-out subjects": 27}
    assert list(bars.BARS["base"].values()) == [0.93, 0.92, 0.88, 0.97, 0.95]
    assert list(bars.BARS["held-out triples"].values()) == [0.88, 0.88, 0.80, None, None]
    assert list(bars.BARS["ruler"].values()) == [0.98, 0.97, 0.97, 0.97, 0.97] and set(bars.BARS["text"].values()) == {0.99}
    assert list(bars.BARS["judge's CLIP"].values()) == [0.93, 0.95, 0.95, 0.95, 0.95] and list(bars.BARS["judge"].values()) == [0.85, 0.97]
    assert list(bars.BARS["files"].values()) == [24, 40, 1] and bars.BARS["speed"] == {"seconds a picture": 1.5}


def test_a_linear_probe_reads_what_is_linear_and_nothing_else():
    corners = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]).repeat(10, 1)
    linear, crossed = corners[:, 0].long(), (corners[:, 0] != corners[:, 1]).long()
    asked = corners[:8] + 0.1
    hits = bars.linear_probe(corners, {"linear": linear, "crossed": crossed}, asked, {"linear": linear[:8], "crossed": crossed[:8]})
    assert hits["linear"] == 8 and hits["crossed"] <= 6  # no line parts the corners of exclusive or


def test_retrieval_counts_equal_captions_as_one():
    texts = torch.eye(4)[[0, 1, 0, 2]]
    captions = ["a", "b", "a", "c"]
    pictures = torch.eye(4)[[0, 1, 0, 1]]
    assert bars.retrieved(pictures, texts, captions) == 3  # the last picture finds b instead of c
    pictures = torch.tensor([[0.6, 0.8, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]])
    assert bars.retrieved(pictures, texts, captions) == 3


def test_files_are_counted(tmp_path):
    (tmp_path / "unet").mkdir()
    save_file({"a": torch.zeros(3000).half(), "steps": torch.zeros(5, dtype=torch.int64)}, tmp_path / "unet" / "w.safetensors")
    save_file({"a": torch.zeros(1000)}, tmp_path / "v.safetensors")
    (tmp_path / "note.txt").write_bytes(b"x" * 2**20)
    largest, everything, half = evaluation.file_rows(tmp_path)
    assert largest.measured == 1.0 and half.measured == 0.75 and everything.n == 3
    assert everything.measured == pytest.approx(sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) / 2**20)


def test_the_autoencoder_is_measured_on_both_sets():
    """An autoencoder that is off by .1 towards the middle everywhere: 10 log10(4 / .01) dB on any picture."""
    vae = SimpleNamespace(
        encode=lambda seen: SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: seen)),
        decode=lambda seen: SimpleNamespace(sample=seen - 0.1 * seen.sign()))
    unseen, subjects = evaluation.autoencoder_rows(SimpleNamespace(vae=vae), pixels(describe(5, 1)))
    assert (unseen.n, subjects.n, unseen.unit) == (5, 60, "dB")
    assert unseen.measured == pytest.approx(26.0206, abs=0.01) and subjects.measured == pytest.approx(26.0206, abs=0.01)


class Reader:
    """Stands for the ruler: reads the truth of `pictures` in their order, but the first `wrong` classes."""

    def __init__(self, pictures, wrong):
        self.pictures, self.wrong = pictures, wrong

    def read(self, seen):
        found = labels(self.pictures)
        found["class"][: self.wrong] = (found["class"][: self.wrong] + 1) % 12
        return found


def test_the_ruler_is_counted_per_attribute():
    pictures = describe(20, 4)
    rows = {row.name: row for row in evaluation.ruler_rows(Reader(pictures, 3), pixels(pictures), pictures)}
    assert rows["class"].measured == pytest.approx(17 / 20) and rows["class"].met is False
    assert all(rows[kind].measured == 1.0 for kind in KINDS if kind != "class") and list(rows) == list(KINDS)


def test_the_text_probe_is_fresh_and_asks_about_other_captions():
    """States that count words are read perfectly where the word decides; states of noise are not."""
    words = tokenizer.build()

    def counts(input_ids):
        return SimpleNamespace(pooler_output=torch.zeros(len(input_ids), len(words)).scatter_add_(1, input_ids, torch.ones(input_ids.shape)))

    def noise(input_ids):
        return SimpleNamespace(pooler_output=torch.randn(len(input_ids), 20, generator=torch.Generator().manual_seed(0)))

    def base(encoder_):
        return SimpleNamespace(tokenizer=words, text_encoder=encoder_, device=torch.device("cpu"))

    told = {row.name: row for row in evaluation.text_rows(base(counts), 400, 150)}
    assert told["class"].measured > 0.98 and told["pattern"].measured > 0.95 and told["class"].n == 150
    guessed = {row.name: row.measured for row in evaluation.text_rows(base(noise), 400, 150)}
    assert guessed["class"] < 0.25 and guessed["colour"] < 0.3
    one, two = (text.draw_captions(words, 150, evaluation.SEEDS[name], None)[0] for name in ("probe", "probe test"))
    assert [said.text for said in one] != [said.text for said in two]


def test_samples_are_graded_against_their_prompts(monkeypatch):
    """The 'base' draws the truth, but for two prompts of ten another thing, and of the held-out three one wrong."""
    asked = []

    def draw(base, prompts, seed, progress):
        asked.append(prompts)
        held = len(asked) == 2
        described = describe(len(prompts), evaluation.SEEDS["held-out prompts" if held else "prompts"], held)
        assert prompts == [full_caption(picture) for picture in described]
        progress(len(prompts))
        wrong = 1 if held else 2
        return pixels([replace(picture, noun="house" if picture.noun != "house" else "ball") if place < wrong else picture
                       for place, picture in enumerate(described)])

    monkeypatch.setattr(evaluation, "sampled", draw)
    monkeypatch.setattr(evaluation.autoencoder, "reconstruct", lambda vae, drawn: drawn)
    said = []
    rows, ceilings = evaluation.base_rows(SimpleNamespace(vae=None), Ruler.load(TOYBOX / "ruler.safetensors"), 10, said.append)
    found = {(row.group, row.name): row for row in rows}
    assert found["base", "class"].measured == pytest.approx(0.8) and found["base", "class"].n == 10
    assert found["held-out triples", "class"].measured == pytest.approx(2 / 3) and found["held-out triples", "scene"].bar is None
    assert found["base", "scene"].measured == ceilings["base, true pictures"]["scene"] == 1.0 and any("10 of 10" in line for line in said)
    held = describe(3, evaluation.SEEDS["held-out prompts"], True)
    assert all(held_out(picture.noun, picture.colour, picture.pattern) for picture in held)


def test_the_shipped_clip_is_asked_by_swapping_one_attribute():
    pictures = describe(12, 8)
    drawn = pixels(pictures)
    rows = {row.name: row for row in evaluation.judge_rows(TOYBOX_JUDGE, drawn, pictures)}
    clip = DualEncoder.from_folder(TOYBOX_JUDGE / "clip")
    words = CLIPTokenizer.from_pretrained(TOYBOX_JUDGE / "clip", local_files_only=True)
    wins = 0
    for picture, shown in zip(pictures, drawn, strict=True):
        said = [full_caption(replace(picture, colour=colour)) for colour in COLOUR_NAMES]
        seen, read = evaluation.clip_features(clip, words, shown[None], said)
        wins += COLOUR_NAMES[int((seen @ read.T).argmax())] == picture.colour
    assert rows["colour"].measured == pytest.approx(wins / 12) and rows["retrieval"].n == 12
    assert list(rows) == [*KINDS, "retrieval", "same subject"] and rows["same subject"].n == 96
    assert judge._swapped(pictures[0], "class", "cat") == replace(pictures[0], noun="cat")


def test_the_area_counts_pairs_of_different_places():
    """Against two loops over all pairs, with mean colours as features."""
    model = lambda pixel_values: SimpleNamespace(pooler_output=pixel_values.mean(dim=(2, 3)))  # noqa: E731
    seen = np.stack([[np.asarray(oracle(subject, scene, "photo", place), float).mean(axis=(0, 1)) / 255 for place, scene in enumerate(SCENE_NAMES)]
                     for subject in SUBJECTS.values()])
    seen = (seen - 0.5) / 0.25
    seen /= np.linalg.norm(seen, axis=-1, keepdims=True)
    right, wrong = [], []
    for a in range(12):
        for b in range(12):
            for i in range(8):
                right += [seen[a, i] @ seen[b, j] for j in range(i + 1, 8) if a == b]
                wrong += [seen[a, i] @ seen[b, j] for j in range(8) if a < b and i != j]
    area = np.mean([(one > np.array(wrong)).mean() for one in right])
    assert encoder.subjects_auc(model) == pytest.approx(area, abs=1e-4)


def evaluated(**changes) -> dict:
    """What `evaluate` returns, as it were."""
    rows = [bars.number("autoencoder", "unseen pictures", 29.4, 1000), bars.share("base", "class", 99, 100), bars.share("base", "colour", 90, 100),
            bars.share("held-out triples", "style", 30, 30), bars.number("files", "largest", 16.9, 23), bars.number("files", "fp16", 1.0, 23),
            bars.number("speed", "seconds a picture", 0.912, 5)]
    return {"model": "toybox", "model_hash": "abcd", "prediction": "epsilon", "prompts": 100, "unseen": 1000, "captions": [3000, 2000],
            "rows": [row.facts() for row in rows], "ceilings": {"base, true pictures": dict.fromkeys(KINDS, 0.995)},
            "sampler": {"name": "dpm++", "steps": 25, "guidance": 4.0}, "seeds": evaluation.SEEDS, "parts": {"unet/w.safetensors": 8837380},
            "versions": {"torch": "2"}, "machine": {"threads": 2, "cores": 2, "processor": "x"}, "seconds": 1.0, **changes}


def test_the_card_says_every_number_and_what_is_missed(tmp_path):
    (tmp_path / "card.json").write_text(json.dumps({"command": "finetune pretrain toybox", "seed": 0, "seconds": 7200, "versions": {"torch": "2"},
                                                    "stages": {"unet": {"seconds": 5000.0}}}), encoding="utf-8")
    numbers, readme = card.write_card(evaluated(), tmp_path)
    assert json.loads(numbers.read_text(encoding="utf-8"))["rows"][1]["measured"] == 0.99
    page = readme.read_text(encoding="utf-8")
    assert page.startswith("---\nlicense: apache-2.0\n") and "Apache-2.0" in page and "## Limits" in page
    for line in ("| autoencoder: unseen pictures | ≥ 29 dB | 29.40 dB | 1,000 | yes |", "| base: class | ≥ .93 | .990 (.95-1.00) | 100 | yes |",
                 "| base: colour | ≥ .92 | .900 (.83-.94) | 100 | **no** |", "| held-out triples: style | - | 1.000 (.89-1.00) | 30 |  |",
                 "| files: largest | ≤ 24 MiB | 16.90 MiB | 23 | yes |", "| speed: a picture of 25 steps | ≤ 1.5 s | 0.91 s | 5 | yes |",
                 "1 of 6 bars are missed: base: colour .900 (.83-.94), asked ≥ .92.", "| unet/w.safetensors | 8,837,380 |", "2.0 hours", "| unet | 5,000 |"):
        assert line in page, line
    assert "Every bar is met." in card.model_card(evaluated(rows=evaluated()["rows"][:2]))


def test_the_command_prints_a_table_of_80_columns_and_writes_the_card(tmp_path, capfd, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation, "evaluate", lambda model, prompts, say: asked.append((model, prompts)) or evaluated())
    monkeypatch.setenv("COLUMNS", "120")
    assert run(["toybox", "evaluate", "--prompts", "24", "--output", str(tmp_path / "card")]) == 0
    said = capfd.readouterr().out
    table = [line for line in said.splitlines() if line.startswith(("┏", "┃", "│", "├"))]
    assert {len(line) for line in table} == {80} and asked == [("toybox", 24)]
    assert any("base: colour" in line and "≥ .92" in line and ".900 (.83-.94)" in line and " NO " in line for line in table)
    assert sorted(path.name for path in (tmp_path / "card").iterdir()) == ["README.md", "evaluation.json"]


def test_another_family_has_no_bars(tiny_model):
    with pytest.raises(Problem, match="not of the toybox family"):
        evaluation.evaluate(str(tiny_model), say=quiet)
