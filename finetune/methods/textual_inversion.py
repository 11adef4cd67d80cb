"""Textual Inversion: learn the embedding of one new word; everything else stays as it is.

Gal, Alaluf, Atzmon, Patashnik, Bermano, Chechik, Cohen-Or: An Image is Worth One Word, ICLR 2023 (2208.01618).
Only the new rows are parameters, laid over the frozen table (`finetune.model.text.TokenOverlay`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from finetune.data.prompts import OBJECT_TEMPLATES, STYLE_TEMPLATES
from finetune.errors import Problem
from finetune.formats import embedding, header
from finetune.formats.embedding_keys import holds_embedding
from finetune.methods.base import Group, Loaded, Method, files_of
from finetune.model.base import Base
from finetune.model.conditioning import Cond
from finetune.model.text import add_tokens, encode
from finetune.model.words import check_initializer, check_placeholder
from finetune.settings import TrainSettings, setting

DIFFUSERS = ("learned_embeds.safetensors", "learned_embeds_2.safetensors")  # of each text encoder


class Settings(TrainSettings):
    """Textual Inversion's own settings and defaults."""

    METHOD: ClassVar[str] = "textual-inversion"

    learning_rate: float = setting(5e-3, "peak learning rate", gt=0)
    placeholder: str | None = setting(None, "the new word, one the model does not know: '<my-dog>' [default: '<my-NOUN>']", group="method")
    initializer: str | None = setting(None, "words to start from, may be several tokens [default: the class noun]", group="method")
    vectors: int = setting(1, "embeddings the new word stands for; more learn more and edit worse", unit="vectors", group="method", ge=1, le=32)
    templates: Literal["object", "style", "prompt"] = setting(
        "object", "training prompts: 27 for objects, 19 for styles, or only the instance prompt", group="method")
    norm_limit: float = setting(0.0, "largest norm of a row as a multiple of the table's median; 0 is off", group="method", ge=0)


class TextualInversion(Method):
    """Only the new rows of the token table train: of both tables where the model has two text encoders."""

    name = "textual-inversion"
    title = "Textual Inversion"
    paper = "Gal et al. 2023, arXiv 2208.01618"
    Settings = Settings

    @property
    def noun(self) -> str:
        noun = self.settings.class_noun or self.settings.initializer
        if not noun:
            raise Problem("Neither --initializer nor --class-noun was given.", "The new word must start from a word the model knows.",
                          "Add --initializer dog (or backpack, watercolor, ...).")
        return noun

    @property
    def subject(self) -> str:
        return self.settings.subject or self.placeholder

    @property
    def trigger(self) -> str:
        return self.placeholder

    @property
    def placeholder(self) -> str:
        """The new word."""
        return self.settings.placeholder or f"<my-{self.noun.replace(' ', '-')}>"

    def templates(self) -> list[str]:
        if self.settings.instance_prompt or self.settings.templates == "prompt":
            return [self.settings.instance_prompt or "a photo of a {}"]
        return list(OBJECT_TEMPLATES if self.settings.templates == "object" else STYLE_TEMPLATES)

    @property
    def stem(self) -> str:
        return "".join(sign if sign.isascii() and (sign.isalnum() or sign in "._-") else "" for sign in self.placeholder) or self.name

    def facts(self) -> list[tuple[str, str]]:
        return [("new word", f"{self.placeholder}, {self.settings.vectors} vector{'s' * (self.settings.vectors > 1)}, "
                             f"starting from “{self.settings.initializer or self.noun}”")]

    def check(self) -> None:
        super().check()
        if self.settings.prior != "none":
            raise Problem(f"--prior {self.settings.prior} is of no use to Textual Inversion.",
                          "It changes no picture whose prompt lacks its word, so there is nothing to preserve.", "Leave --prior out.")
        if any(space in self.placeholder for space in " \t\n"):
            raise Problem(f"The placeholder {self.placeholder!r} contains a space.", "It must be one word.", "Use a dash: '<my-dog>'.")
        if self.placeholder not in self.subject:
            raise Problem(f"The subject phrase {self.subject!r} does not contain the placeholder {self.placeholder!r}.",
                          "Nothing would be learned.", f"Use --subject {self.placeholder!r} or leave it out.")

    def attach(self, base: Base) -> list[Group]:
        check_placeholder(base, self.placeholder)
        self._rows = add_tokens(base, self.placeholder, *(self._start(encoder, tokenizer) for _, encoder, tokenizer in base.encoders()))
        medians = [encoder.get_input_embeddings().weight.float().norm(dim=1).median() for _, encoder, _ in base.encoders()]
        self._limits = [float(median) * self.settings.norm_limit for median in medians]
        return [Group(dict(zip(("rows", "rows_2"), self._rows, strict=False)))]

    def _start(self, encoder: nn.Module, tokenizer: Any) -> Tensor:
        """Rows (n x D) of one encoder to start from: the initializer's tokens, cycled or cut to the number of vectors."""
        words = self.settings.initializer or self.noun
        if words != self.settings.class_noun:  # a class noun that is only spelled is a poor start, and no mistake
            check_initializer(tokenizer, words)
        ids = tokenizer(words, add_special_tokens=False).input_ids
        if not ids or tokenizer.unk_token_id in ids and tokenizer.unk_token_id != tokenizer.eos_token_id:
            raise Problem(f"The initializer {words!r} is unknown to this model.", "Its tokenizer cannot split it.", "Use a plain word.")
        ids = [ids[number % len(ids)] for number in range(self.settings.vectors)]
        table = encoder.get_input_embeddings()
        return table(torch.tensor(ids, device=table.weight.device)).detach()

    def condition(self, base: Base, captions: list[str]) -> Cond:
        return encode(base, captions)

    @torch.no_grad()
    def after_step(self, base: Base) -> None:
        for rows, limit in zip(self._rows, self._limits, strict=True):
            if limit:
                rows.mul_((limit / rows.norm(dim=1, keepdim=True)).clamp(max=1.0))

    def training_modules(self, base: Base) -> list[nn.Module]:
        return []

    def expected_bytes(self, base: Base) -> int:
        numbers = sum(rows.numel() for rows in self._rows)
        return (3 if len(self._rows) == 1 else 2) * numbers * 4  # every vector in each of three files, or of SDXL's two; always float32

    def targets(self) -> tuple[str, ...]:
        return ("diffusers", "webui", "kohya")

    def export(self, base: Base, folder: Path, metadata: dict[str, str]) -> None:
        """TRIGGER.safetensors and TRIGGER.pt (web UI), and learned_embeds.safetensors (diffusers).

        SDXL: the pair in TRIGGER.safetensors, and for diffusers one file for each encoder, the second's learned_embeds_2.
        """
        vectors = [rows.detach().float().cpu() for rows in self._rows]
        embedding.write_safetensors(folder / f"{self.stem}.safetensors", vectors[0], metadata, *vectors[1:])
        if len(vectors) == 1:
            embedding.write_webui(folder / f"{self.stem}.pt", vectors[0], self.stem, self.settings.steps, base.known_as, base.hash[:10])
        for own, file in zip(vectors, DIFFUSERS, strict=False):
            embedding.write_diffusers(folder / file, own, self.placeholder, metadata)

    @classmethod
    def find(cls, path: Path) -> Path | None:
        files = files_of(path)
        files.sort(key=lambda file: file.name != DIFFUSERS[0])
        for file in files:
            if file.suffix == ".safetensors":
                found = header.read_header(file)
                if holds_embedding({name: info.shape for name, info in found.tensors.items()}, found.metadata):
                    return file
        return next((file for file in files if file.suffix in (".pt", ".bin") and _holds_embedding(file)), None)

    @classmethod
    def load(cls, base: Base, path: Path, strength: float) -> Loaded:
        """Add the trigger's rows; strength scales them around the mean row of the table, and 0 adds no word: that is the base."""
        found = embedding.read(path)
        given = [found.vectors] if found.second is None else [found.vectors, found.second]
        other = path.with_name(DIFFUSERS[1])
        if path.name == DIFFUSERS[0] and other.is_file():
            given.append(embedding.read(other).vectors)
        tables = [encoder.get_input_embeddings().weight for _, encoder, _ in base.encoders()]
        widths, wanted = [rows.shape[1] for rows in given], [table.shape[1] for table in tables]
        if widths != wanted:
            raise Problem(f"The embedding {path} is {' and '.join(map(str, widths))} wide, the model {base.name!r} takes {' and '.join(map(str, wanted))}.",
                          "It was trained on another family of models.", "Use it with a model of that family.")
        if len({len(rows) for rows in given}) > 1:
            raise Problem(f"The embedding {path} has {len(given[0])} and {len(given[1])} vectors for the two text encoders.",
                          "The word stands for the same number of tokens in both.", "The file is damaged: export it again.")
        trigger = word_of(path, found)
        if strength == 0:
            return Loaded(cls.name, trigger, path, found.metadata)
        if strength != 1:
            middles = [table.float().mean(0) for table in tables]
            given = [middle + strength * (rows.to(middle) - middle) for rows, middle in zip(given, middles, strict=True)]
        add_tokens(base, trigger, *given)
        return Loaded(cls.name, trigger, path, found.metadata)


def word_of(path: Path, found: embedding.Embedding) -> str:
    """The word an embedding answers to: the one its file states; of a web UI's pickle the file's stem, whatever it was called inside."""
    of_webui = path.suffix != ".safetensors" and found.token == found.metadata.get("name")
    return (not of_webui and found.token) or found.metadata.get("finetune.trigger") or path.stem


def _holds_embedding(path: Path) -> bool:
    """Whether a pickle is an embedding: any dict without the integer keys of a hypernetwork."""
    from finetune.formats.pickles import load_restricted

    content = load_restricted(path)
    return isinstance(content, dict) and not any(isinstance(key, int) for key in content)
