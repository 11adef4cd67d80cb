"""Words before training: whether a placeholder is new, an initializer known, and a prompt short enough to be read to its end.

These look at tokenizers alone. A learned word that is loaded from a file is looked at by `finetune.model.text.add_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import Problem
from finetune.model.base import Base
from finetune.model.text import expand

END = "</w>"  # what CLIP's byte pair encoding puts behind the last piece of a word
SHORTEST = 2  # letters of a word that could be meant; every letter is a word of the vocabulary by itself
KNOWN = 3  # letters of a piece that stands for more than its spelling


def check_placeholder(base: Base, word: str) -> None:
    """A new word is new: neither in the vocabulary (`add_tokens` says that) nor several known words in a row.

    Raises:
        Problem: the model reads it as words it knows.
    """
    for _, _, tokenizer in base.encoders():
        pieces = [piece.removesuffix(END) for piece in tokenizer.tokenize(word)]
        vocabulary = tokenizer.get_vocab()
        if word.isalpha() and len(pieces) > 1 and all(len(piece) >= SHORTEST and piece + END in vocabulary for piece in pieces):
            raise Problem(f"The placeholder {word!r} reads as the words {' and '.join(pieces)} to this model.",
                          "A program without the learned file would render those, and nobody would see that it is missing.",
                          f"Choose another, such as '<{word}>'.")


def check_initializer(tokenizer: Any, words: str) -> None:
    """A word to start from means something to the model.

    Raises:
        Problem: there is none, or the tokenizer only spells it, in pieces of one or two letters.
    """
    for word in words.split() or [words]:
        pieces = [piece.removesuffix(END) for piece in tokenizer.tokenize(word)]
        if not pieces or len(pieces) > 1 and all(len(piece) < KNOWN for piece in pieces):
            spelled = f"Its tokenizer spells it: {' '.join(pieces)}." if pieces else "It holds nothing to read."
            raise Problem(f"The initializer {words!r} is unknown to this model.", spelled, "Use a plain word the model knows with --initializer, such as cat.")


def check_prompts(base: Base, prompts: Mapping[str, str | None]) -> None:
    """Prompts given as settings are read to their end. Captions are not asked here: their end is cut, and the run says so.

    Args:
        prompts: flag -> prompt.

    Raises:
        Problem: one is longer than the model reads.
    """
    limit = base.tokenizer.model_max_length
    for flag, prompt in prompts.items():
        count = len(base.tokenizer(expand(base, prompt), verbose=False).input_ids) if prompt else 0
        if count > limit:
            raise Problem(f"{flag} has {count - 2} tokens; this model reads {limit - 2}.", "Its end would be cut off without a trace.",
                          f"Shorten it: “{prompt[:60]}…”.")


def check_prediction(base: Base, told: Mapping[str, str], path: Any) -> None:
    """An artifact predicts what its base does: noise, or velocity (v). Files of kohya's scripts and the web UIs say it too.

    Args:
        told: the artifact's metadata.

    Raises:
        Problem: it says the other.
    """
    said = told.get("finetune.prediction_type") or told.get("modelspec.prediction_type") or ""
    wanted = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}.get(said)
    if wanted and wanted != base.prediction:
        raise Problem(f"{path} was trained on a model that predicts {wanted}; {base.name!r} predicts {base.prediction}.",
                      "Its changes would push pictures in another direction.", "Load it on a base of the kind it was trained on.")
