"""How the embedded base and its judge are trained: the small functions, against numbers worked out otherwise."""

import json
import math
from random import Random

import numpy as np
import pytest
import torch
from torch import nn

from finetune.errors import Problem
from finetune.toybox import autoencoder, encoder, judge, looks, pretrain, tokenizer
from finetune.toybox.captions import caption
from finetune.toybox.datasets import describe, pixels
from finetune.toybox.progress import Checkpoint, cosine, draw_indices
from finetune.toybox.ruler import Ruler, labels
from finetune.toybox.subjects import SUBJECTS
from finetune.toybox.text import answers
from finetune.toybox.world import Picture


def test_every_word_of_the_world_and_of_the_templates_is_one_token(tmp_path):
    words = tokenizer.build()
    for word in tokenizer.world_words():
        assert len(words(word).input_ids) == 3, word
    ids = words("a photo of a sks backpack in the snow", padding="max_length").input_ids
    assert len(ids) == 32 and ids[0] == words.bos_token_id and ids[10:] == [words.eos_token_id] * 22
    assert words.eos_token_id == len(words) - 1
    tokenizer.save(words, tmp_path)
    saved = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert saved == words.get_vocab() and all(merge.replace(" ", "") in saved for merge in merges)
    again = type(words).from_pretrained(tmp_path)
    strange = "A Zebra, 3.5 metres – très grand!"
    assert again(strange).input_ids == words(strange).input_ids


def test_every_caption_fits_and_has_no_unknown_word():
    words, random = tokenizer.build(), Random(1)
    for picture in describe(300, seed=9):
        ids = words(caption(picture, random, identifiers=0.5).text).input_ids
        assert len(ids) <= 25
        assert all(words.convert_ids_to_tokens(one).endswith("</w>") for one in ids[1:-1])


def test_folding_statistics_changes_latents_but_not_pictures():
    torch.manual_seed(0)
    vae = autoencoder.build((8, 16, 16)).eval()
    drawn = pixels(describe(24, seed=4))
    before = autoencoder.reconstruct(vae, drawn)
    mean, std = autoencoder.encode(vae, drawn)
    autoencoder.fold_statistics(vae, drawn)
    folded_mean, folded_std = autoencoder.encode(vae, drawn)
    assert np.abs(autoencoder.reconstruct(vae, drawn).astype(int) - before).max() <= 1
    assert torch.allclose(folded_mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(folded_mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4)
    spread = mean.std(dim=(0, 2, 3)).view(1, 4, 1, 1)
    assert torch.allclose(folded_std, std / spread, rtol=1e-3)


def test_psnr_of_a_known_error():
    target = torch.zeros(2, 3, 8, 8)
    assert autoencoder.psnr(target + 0.2, target) == pytest.approx(10 * math.log10(4 / 0.04), abs=1e-4)


def test_reconstruction_loss_of_a_ramp():
    """Error 0.1 per column: mean 0.15, mean square 0.035, horizontal differences 0.1, vertical ones 0."""
    error = (torch.arange(4) * 0.1).expand(1, 3, 4, 4)
    loss = autoencoder.reconstruction_loss(error, torch.zeros(1, 3, 4, 4))
    assert float(loss) == pytest.approx(0.15 + 2 * 0.035 + 0.25 * 0.1, abs=1e-6)


def test_cosine_schedule():
    assert cosine(0, 100, warmup=10) == pytest.approx(0.1)
    assert cosine(10, 110, warmup=10) == pytest.approx(1.0)
    assert cosine(60, 110, warmup=10) == pytest.approx(0.5)
    assert cosine(110, 110, warmup=10) == pytest.approx(0.0)


def test_draws_depend_on_the_step_alone():
    assert torch.equal(draw_indices(100, 8, 5, 0), draw_indices(100, 8, 5, 0))
    assert not torch.equal(draw_indices(100, 8, 5, 0), draw_indices(100, 8, 6, 0))


def test_a_checkpoint_brings_back_model_optimizer_and_step(tmp_path):
    def fresh():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model, optimizer, seed):
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()

    straight, straight_optimizer = fresh()
    for seed in range(4):
        step(straight, straight_optimizer, seed)
    model, optimizer = fresh()
    for seed in range(2):
        step(model, optimizer, seed)
    Checkpoint(tmp_path / "c.ckpt", every_seconds=0).maybe(model, optimizer, 2, 1.5)
    model, optimizer = fresh()
    assert Checkpoint(tmp_path / "c.ckpt").resume(model, optimizer) == (2, 1.5)
    for seed in range(2, 4):
        step(model, optimizer, seed)
    assert torch.equal(model.weight, straight.weight)


def test_captions_match_the_pictures_they_are_true_of():
    red = Picture("mug", "red", None, "plain", "snow", "photo", 1)
    striped = Picture("mug", "red", "white", "striped", "snow", "photo", 2)
    duck = Picture("duck", "red", None, "plain", "beach", "drawing", 3)
    silent = {"colour": 0.0, "pattern": 0.0, "scene": 1.0, "style": 1.0}
    said = [caption(picture, Random(0), silent) for picture in (red, striped, duck)]
    assert judge.matches(said, [red, striped, duck]).tolist() == [
        [True, False, False],
        [True, True, False],  # what is silent about the pattern is true of a striped mug as well
        [False, False, True],
    ]
    nameless = [caption(picture, Random(0), {**silent, "colour": 1.0}) for picture in (red, duck)]
    scarlet = Picture("mug", "blue", None, "plain", "city", "photo", 1)
    assert judge.matches(nameless, [red, scarlet, duck]).tolist() == [[True, False], [True, False], [False, True]]


def test_contrastive_loss_is_cross_entropy_when_every_caption_is_unique():
    torch.manual_seed(0)
    pictures, texts = (nn.functional.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    loss = judge.contrastive_loss(pictures, texts, torch.tensor(7.0), torch.eye(5, dtype=torch.bool), torch.arange(5.0))
    logits = (7 * pictures @ texts.T).double().numpy()
    rows = np.mean([np.log(np.exp(logits[i]).sum()) - logits[i, i] for i in range(5)])
    columns = np.mean([np.log(np.exp(logits[:, i]).sum()) - logits[i, i] for i in range(5)])
    assert float(loss) == pytest.approx((rows + columns) / 2, abs=1e-5)


def test_of_two_true_captions_the_one_that_says_more_is_wanted_more():
    table, says = np.array([[1, 1, 0], [0, 0, 1]]), [2.0, 4.0, 5.0]
    pictures, texts = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
    found = judge.contrastive_loss(torch.tensor(pictures), torch.tensor(texts), torch.tensor(5.0), torch.tensor(table).bool(), torch.tensor(says))
    logits = 5 * pictures @ texts.T
    by_picture = np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    by_caption = np.log(np.exp(logits) / np.exp(logits).sum(0, keepdims=True))
    rows = -(by_picture[0, 0] / 17 + by_picture[0, 1] * 16 / 17 + by_picture[1, 2]) / 2  # two attributes against four: 1 to 16
    columns = -(by_caption[0, 0] + by_caption[0, 1]) / 2  # the third caption is a rival, asked of the pictures alone
    assert float(found) == pytest.approx((rows + columns) / 2, rel=1e-6)


def test_rivals_are_the_full_captions_and_captions_wrong_in_one_attribute():
    pictures = describe(200, seed=6)
    said = judge.rivals(pictures, Random(0))
    table = judge.matches(said, pictures)
    silenced = torch.tensor([one.pattern is not None and other.pattern is None for one, other in zip(said[:200], said[200:], strict=True)])
    assert table[:, :200].diagonal().all() and torch.equal(table[:, 200:].diagonal(), silenced)  # silence says nothing wrong
    assert judge.named(said)[200:][silenced].lt(judge.named(said)[:200][silenced]).all()
    kinds = ("noun", "colour", "pattern", "scene", "style")
    changed = [[kind for kind in kinds if getattr(one, kind) != getattr(other, kind)] for one, other in zip(said[:200], said[200:], strict=True)]
    assert all(len(one) == 1 for one in changed) and 0.4 < sum(one == ["pattern"] for one in changed) / 200 < 0.6


def test_hard_negative_groups_share_two_attributes():
    pictures = describe(3000, seed=6)
    chosen = judge.groups(pictures, seed=3)
    assert len(chosen) == 128 and judge.groups(pictures, seed=3) == chosen
    first = [pictures[place] for place in chosen[:8]]
    shared = sum(len({getattr(one, kind) for one in first}) == 1 for kind in ("noun", "colour", "pattern", "scene", "style"))
    assert shared >= 2


def test_attracting_partners_has_the_loss_of_nt_xent():
    torch.manual_seed(1)
    both = nn.functional.normalize(torch.randn(6, 4), dim=1)
    similar = np.exp((both @ both.T).double().numpy() / 0.1)
    np.fill_diagonal(similar, 0)
    expected = np.mean([-np.log(similar[i, (i + 3) % 6] / similar[i].sum()) for i in range(6)])
    assert float(encoder.attract(both)) == pytest.approx(expected, rel=1e-4)


def test_families_differ_in_one_way_and_never_show_a_subject():
    random = Random(0)
    for _ in range(60):
        first, recoloured, other, varied = looks.family(random)
        assert recoloured.noun == first.noun and recoloured.body != first.body
        assert other.noun != first.noun and other.body == first.body and other.second == first.second
        assert varied.noun == first.noun and varied.body == first.body
        assert (varied.pattern, varied.second) != (first.pattern, first.second)
        for look in (first, recoloured, other, varied):
            assert (look.second is None) == (look.pattern == "plain")
            assert all(look != subject.look for subject in SUBJECTS.values())


def test_the_ruler_reads_the_same_after_a_trip_to_disk(tmp_path):
    torch.manual_seed(0)
    ruler, pictures = Ruler(width=8).eval(), torch.rand(3, 3, 64, 64)
    ruler.save(tmp_path / "ruler.safetensors")
    again = Ruler.load(tmp_path / "ruler.safetensors")
    for kind, logits in ruler(pictures).items():
        assert torch.allclose(again(pictures)[kind], logits, atol=2e-2)


def test_labels_and_answers_name_the_same_things():
    pictures = describe(50, seed=8)
    said = [caption(picture, Random(0), {"colour": 0, "pattern": 0, "scene": 0, "style": 0}) for picture in pictures]
    truth, read = labels(pictures), answers(said)
    assert all(torch.equal(truth[kind], read[kind]) for kind in truth)


def test_a_stage_below_its_gate_stops_the_rest_and_a_finished_one_is_skipped(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(pretrain.Stages, "_polish", lambda self: runs.append("polish") or {"psnr": 27.0, "subjects": 27.0})
    with pytest.raises(Problem, match="27.000, below its gate of 29"):
        pretrain.Stages(tmp_path, say=lambda line: None).run("polish")
    monkeypatch.setattr(pretrain.Stages, "_polish", lambda self: runs.append("polish") or {"psnr": 29.5, "subjects": 27.5})
    for _ in range(2):
        assert pretrain.Stages(tmp_path, say=lambda line: None).run("polish") == {"polish": {"psnr": 29.5, "subjects": 27.5}}
    assert runs == ["polish", "polish"]
