"""The toybox's CLIP tokenizer: byte-pair encoding (Sennrich et al., 2016) learned on the words of the rendered world.

Every word a caption or a usual prompt template needs is a single token; any other text falls apart into bytes, as in
CLIP. Rare identifiers (`sks`) are single tokens that no picture is ever captioned with, as in Stable Diffusion.
"""

import json
from collections import Counter
from pathlib import Path

from transformers import CLIPTokenizer

from finetune.toybox.captions import (
    IDENTIFIERS,
    PHOTO_ADJECTIVES,
    SCENE_WORDS,
    STYLE_WORDS,
    THING_ADJECTIVES,
)
from finetune.toybox.world import COLOUR_NAMES, NOUN_NAMES

MAX_LENGTH = 32
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

# Words of the Textual Inversion templates (object and style) and of DreamBench's prompts (Ruiz et al., 2023).
TEMPLATE_WORDS = """
    a an the my one of in on at to and with without by under over near top front its it is this that two three
    photo photos picture pictures image painting drawing art rendering rendition illustration depiction style sketch
    cropped close up bright dark good bad clean dirty nice small large big cool weird old new little shiny wet cute
    tone pixel watercolor stripes dots striped dotted plain bottom pocket wearing hat red top floating water milk ocean
    street road cobblestone jungle mountain background house wooden floor pink fabric rug sunflowers around mirror
    sidewalk crowded cube shaped sky sun moon room kitchen garden park window wall box book toy thing subject person
    teal lilac indigo coral navy lime plum gold silver grey gray light view side colour color colors
""".split()


def world_words() -> list[str]:
    """Every word that must be a single token, in a fixed order without repeats."""
    sentences = [phrase for group in (STYLE_WORDS, SCENE_WORDS) for phrases in group.values() for phrase in phrases]
    words = [*NOUN_NAMES, *COLOUR_NAMES, *IDENTIFIERS, *TEMPLATE_WORDS]
    for phrase in (*sentences, *PHOTO_ADJECTIVES, *THING_ADJECTIVES, "two-tone"):
        words += phrase.replace("-", " ").split()
    return list(dict.fromkeys(words))


def byte_symbols() -> list[str]:
    """The 256 printable characters byte-level BPE writes bytes with, in byte order (Radford et al., 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merge the most frequent neighbours until every word is one symbol; ties go to the alphabetically first pair."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for symbols in pieces for pair in zip(symbols, symbols[1:], strict=False))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merged(symbols, best) for symbols in pieces]


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def build() -> CLIPTokenizer:
    """The tokenizer; its end-of-text token has the highest id, where older CLIP code looks for it."""
    merges = learn_merges(world_words())
    symbols = byte_symbols()
    entries = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges), BOS, EOS]
    vocabulary = {token: place for place, token in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH, bos_token=BOS, eos_token=EOS, pad_token=EOS
    )


def save(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write vocab.json and merges.txt (transformers 4) beside tokenizer.json (transformers 5)."""
    folder = Path(folder)
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    settings_path = folder / "tokenizer_config.json"
    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "CLIPTokenizer"
    settings_path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
