"""The score columns: what each means, which direction is better, how often it is wrong, and which are not shown.

A column whose error on known pairs is above `WORST` is taken out: a number that tells right from wrong little better
than a coin does more harm than an empty place. What was taken out, and why, stands under "hidden" in scores.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.evaluation.judge import Judge

WORST = 0.25
GROUPS = ("Subject", "Prompt", "Base kept", "Pictures", "Truth")
# Distances from the base are zero for the base itself by definition, so it is not compared with anyone.
FROM_BASE = ("drift", "other_drift")
# How far a score can go at all: cosines, 1 - cosine, differences of two cosines, shares. KID has no end.
BOUNDS = {**dict.fromkeys(("clip_i", "dino", "clip_t", "pres", "copy", "oracle"), (-1.0, 1.0)), "leak": (-2.0, 2.0),
          **dict.fromkeys(("drift", "other_drift", "diversity"), (0.0, 2.0)), **dict.fromkeys(("asked", "kept"), (0.0, 1.0))}


def columns(judge: Judge) -> list[dict[str, str]]:
    """Every column there may be: key, title (with the encoder's name where values are quoted), direction, group, one sentence."""
    clip, encoder = judge.clip_title, judge.encoder_title
    rows = [
        ("clip_i", f"CLIP-I ({clip})", "higher", "Subject", "Mean CLIP similarity of pictures of the subject to the real pictures."),
        ("dino", encoder, "higher", "Subject", "Mean similarity of pictures of the subject to the real pictures, by the image encoder."),
        ("clip_t", f"CLIP-T ({clip})", "higher", "Prompt",
         "Similarity of pictures of the subject to their prompt, with the class noun in place of the trained word."),
        ("asked", "Asked for", "higher", "Prompt",
         "Share of what the prompt names (thing, place, style) that an independent classifier reads off pictures of the subject."),
        ("drift", "Drift", "lower", "Base kept", "1 - similarity to the untouched base's picture of the same prompt and seed, on the bare class noun."),
        ("other_drift", "Other drift", "lower", "Base kept", "The same on prompts about other things, which training should not touch."),
        ("kept", "Attributes kept", "higher", "Base kept",
         "Share of what prompts about other things name (thing, colour, pattern, place, style) that the classifier reads off their pictures."),
        ("pres", f"PRES ({encoder})", "lower", "Base kept", "Mean similarity of the bare class noun's pictures to the real pictures of the subject."),
        ("leak", "Leak", "lower", "Base kept", "How much nearer to the real pictures the bare class noun's pictures came, compared with the base."),
        ("diversity", "Diversity", "higher", "Pictures", "Mean of 1 - similarity between pictures of the same prompt."),
        ("copy", "Copy", "lower", "Pictures",
         "Mean likeness of layout to the nearest real picture: 1 is the same picture. Told against what honest pictures have."),
        ("oracle", "Likeness to truth", "higher", "Truth",
         "Mean similarity to the true subject drawn in the prompted place and style, by both encoders."),
        ("kid", f"KID ({clip})", "lower", "Truth",
         "Kernel distance between pictures of the subject and true pictures of the same prompts; 0 where they cannot be told apart."),
    ]
    return [dict(zip(("key", "title", "better", "group", "help"), row, strict=True)) for row in rows]


def shown(every: list[dict[str, str]], measured: set[str], errors: Mapping[str, Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Columns to show, with their errors, and those hidden, with the reason. Columns no row has are in neither.

    Args:
        every: all columns, from `columns`.
        measured: keys some row has a value for.
        errors: per key what `Truth.errors` found for this judge: rate, low, high, pairs, against.
    """
    kept: list[dict[str, Any]] = []
    hidden: list[dict[str, Any]] = []
    for column in every:
        if column["key"] not in measured:
            continue
        error = errors.get(column["key"])
        if error is None:
            kept.append(dict(column))
        elif error["rate"] <= WORST:
            kept.append({**column, "error": {key: error[key] for key in ("rate", "low", "high", "pairs", "against") if key in error}})
        else:
            why = f"Wrong on {error['rate']:.0%} of {error['pairs']} pairs whose answer is known ({error['against']}); at most {WORST:.0%} is shown."
            hidden.append({"key": column["key"], "title": column["title"], "error": dict(error), "reason": why})
    return kept, hidden
