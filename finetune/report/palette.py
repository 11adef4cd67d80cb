"""One colour and one mark per method, the same in tables, grid and plots.

Colours are Okabe and Ito's eight, distinguishable with every common colour blindness (Color Universal Design, 2008);
the marks carry the same information without any colour.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.report.read import Comparison


@dataclass(frozen=True)
class Look:
    """Colour as CSS hex, mark as matplotlib's marker and as a character, dash as matplotlib's line style."""

    colour: str
    marker: str
    glyph: str
    dash: str


BASE = Look("#8a857c", "X", "\N{MULTIPLICATION X}", ":")
REAL = Look("#2b2a28", "*", "\N{BLACK STAR}", "--")
_LOOKS = {
    "dreambooth": Look("#D55E00", "o", "\N{BLACK CIRCLE}", "-"),
    "textual-inversion": Look("#0072B2", "s", "\N{BLACK SQUARE}", "-"),
    "lora": Look("#009E73", "D", "\N{BLACK DIAMOND}", "-"),
    "hypernetwork-key-value": Look("#CC79A7", "^", "\N{BLACK UP-POINTING TRIANGLE}", "-"),
    "hypernetwork-key-query": Look("#B58900", "v", "\N{BLACK DOWN-POINTING TRIANGLE}", "--"),
}
_SPARE = (Look("#56B4E9", "P", "\N{HEAVY GREEK CROSS}", "-."), Look("#6A3D9A", "p", "\N{BLACK PENTAGON}", "-."),
          Look("#7A4A12", "h", "\N{BLACK HEXAGON}", "--"))


def looks(comparison: Comparison) -> dict[str, Look]:
    """A look for every row; methods this file does not know get the spare ones in order."""
    found = {"base": BASE, "real": REAL}
    spare = 0
    for row in comparison.runs:
        look = _LOOKS.get(row.row) or (_LOOKS["hypernetwork-key-value"] if row.row == "hypernetwork" else None)
        if look is None:
            look, spare = _SPARE[spare % len(_SPARE)], spare + 1
        found[row.row] = look
    return found
