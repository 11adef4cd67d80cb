"""Numbers as the report prints them."""

import pytest

from finetune.report import words


@pytest.mark.parametrize(("value", "decimals", "text"), [(0.714, 2, ".71"), (-0.031, 2, "−.03"), (1.2, 2, "1.20"), (-0.001, 2, ".00"),
                                                         (0.2754, 3, ".275"), (None, 2, "–")])
def test_scores(value, decimals, text):
    assert words.score(value, decimals) == text


def test_interval_is_empty_without_bounds():
    assert words.interval(-0.03, 0.07) == "[−.03, .07]"
    assert words.interval(None, 0.07) == ""


@pytest.mark.parametrize(("count", "exact", "text"), [(784, False, "784 B"), (3152, False, "3.15 kB"), (3152, True, "3,152 bytes"),
                                                      (17_600_000, False, "17.6 MB"), (4_270_000_000, False, "4.27 GB"),
                                                      (999_600, False, "1 MB"), (223_000, True, "223 kB")])
def test_sizes(count, exact, text):
    assert words.size(count, exact) == text


@pytest.mark.parametrize(("value", "text"), [(0.085, "0.085 s"), (4.21, "4.2 s"), (119, "119 s"), (125, "2 min 5 s"), (1200, "20 min"),
                                             (11_040, "3 h 4 min"), (3599.7, "1 h")])
def test_times(value, text):
    assert words.seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(768, "768"), (102_000, "102 k"), (8_790_000, "8.79 M"), (859_520_964, "860 M"), (3.9e9, "3.9 G")])
def test_parameters(value, text):
    assert words.count(value) == text


@pytest.mark.parametrize(("part", "whole", "text"), [(784, 17_600_000, "1/22,000"), (45, 125, "1/2.8"), (9, 10, "90 %"), (10, 1234, "1/120")])
def test_ratios(part, whole, text):
    assert words.ratio(part, whole) == text


def test_listing_and_articles():
    assert words.listing(["a", "b", "c"]) == "a, b and c"
    assert words.listing(["a"]) == "a" and words.listing([]) == ""
    assert (words.article("owl"), words.article("dog"), words.number_word(4), words.number_word(11)) == ("an owl", "a dog", "four", "11")
