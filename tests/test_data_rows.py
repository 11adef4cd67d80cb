"""Rows are functions of the seed and their place alone."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from finetune.data import Picture, Rows
from finetune.settings import TrainSettings

CAPTIONS = ["one", "two", "three"]


def pictures(count):
    return [Picture(f"{i}.png", Path(f"{i}.png"), None, "", str(i), (8, 8)) for i in range(count)]


def rows_of(count=5, classes=0, **settings):
    settings = TrainSettings(**{"seed": 3, "flip": True, "crop": "random", "caption_dropout": 0.2, **settings})
    return Rows(pictures(count), pictures(classes), settings, [CAPTIONS] * count, "a photo of a dog")


def identity(row):
    return row.index, row.kind, row.picture, row.flip, row.place, row.caption


@pytest.mark.parametrize("classes", [0, 7])
def test_one_process_with_batch_four_equals_two_with_batch_two(classes):
    one, two = rows_of(classes=classes, batch_size=4), rows_of(classes=classes, batch_size=2)
    whole = Counter(identity(row) for step in range(12) for row in one.rows(step))
    split = Counter(identity(row) for step in range(12) for rank in range(2) for row in two.rows(step, rank=rank, world=2))
    assert whole == split
    assert sum(whole.values()) == 48 * (2 if classes else 1)


def test_accumulating_equals_a_larger_batch():
    large, small = rows_of(batch_size=6), rows_of(batch_size=2, accumulate=3)
    for step in range(5):
        assert [identity(row) for row in large.rows(step)] == [
            identity(row) for micro in range(3) for row in small.rows(step, micro)]


def test_instance_rows_do_not_see_class_rows():
    without, with_classes = rows_of(batch_size=3), rows_of(classes=4, batch_size=3, prior_weight=0.25)
    for step in range(20):
        alone, joined = without.rows(step), with_classes.rows(step)
        assert joined[:3] == alone
        assert [row.kind for row in joined] == ["instance"] * 3 + ["class"] * 3
        assert [row.weight for row in joined] == [1.0] * 3 + [0.25] * 3
        assert [row.index for row in joined[3:]] == [row.index for row in alone]


@pytest.mark.parametrize("count", [1, 2, 5, 7, 200])
def test_every_epoch_is_a_permutation(count):
    rows = rows_of(count, classes=count)
    for kind in ("instance", "class"):
        seen = [rows.row(kind, n).picture for n in range(3 * count)]
        for epoch in range(3):
            assert sorted(seen[epoch * count:(epoch + 1) * count]) == list(range(count))
        if count == 200:
            assert seen[:count] != seen[count:2 * count]


def test_kinds_and_seeds_have_their_own_order():
    first, other = rows_of(200, classes=200), rows_of(200, classes=200, seed=4)
    orders = [tuple(source.row(kind, n).picture for n in range(200)) for source in (first, other) for kind in ("instance", "class")]
    assert len(set(orders)) == 4


def test_shares_of_flips_captions_places_and_dropout():
    rows = [rows_of().row("instance", n) for n in range(2000)]
    assert np.mean([row.flip for row in rows]) == pytest.approx(0.5, abs=0.04)
    assert np.mean([row.caption == "" for row in rows]) == pytest.approx(0.2, abs=0.03)
    counts = Counter(row.caption for row in rows if row.caption)
    assert set(counts) == set(CAPTIONS) and min(counts.values()) > 450
    places = np.array([row.place for row in rows])
    assert places.min() >= 0 and places.max() < 1
    np.testing.assert_allclose(places.mean(0), 0.5, atol=0.03)
    assert abs(np.corrcoef(places.T)[0, 1]) < 0.07


def test_switched_off_means_off():
    rows = [rows_of(flip=False, crop="center", caption_dropout=0.0).row("instance", n) for n in range(100)]
    assert {(row.flip, row.place, row.caption == "") for row in rows} == {(False, (0.5, 0.5), False)}


def test_captions_are_the_pictures_own():
    settings = TrainSettings()
    rows = Rows(pictures(3), [], settings, [["a"], ["b"], ["c"]])
    assert all(rows.row("instance", n).caption == "abc"[rows.row("instance", n).picture] for n in range(30))
    with pytest.raises(ValueError, match="captions"):
        Rows(pictures(3), [], settings, [["a"], [], ["c"]])
