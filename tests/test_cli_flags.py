"""Flags are made from declared settings, and only what was really given reaches them."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict

from finetune.cli.flags import command, flag_type
from finetune.cli.verbs import Verb
from finetune.errors import Problem
from finetune.settings import setting


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    place: Path | None = setting(None, "where", group="arguments")
    rank: int = setting(16, "inner width", unit="numbers", group="method", ge=1)
    alpha: float | None = setting(None, "scale", group="method")
    flip: bool = setting(False, "mirror", group="pictures")
    bias: bool = setting(True, "bias", group="pictures")
    crop: Literal["center", "random"] = setting("center", "crop", group="pictures")
    prompt: list[str] = setting([], "prompt", group="pictures")
    folder: Path = setting(Path("out"), "folder", group="run")
    rows: dict[str, dict[str, Any]] = setting({}, "tables", group="run")


@pytest.fixture()
def call(monkeypatch):
    """Runs the generated command and returns the settings it was called with."""
    import sys

    seen = []
    module = types.ModuleType("finetune_test_verb")
    module.Settings, module.run = Settings, lambda settings, console: seen.append(settings)
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def run(*words: str) -> Settings:
        command(Verb("try", "Tries.", "panel", module.__name__)).main(list(words), prog_name="try", standalone_mode=False)
        return seen.pop()

    return run


def test_nothing_given_is_nothing_set(call):
    settings = call()
    assert settings == Settings() and settings.model_fields_set == set()


def test_every_kind_of_flag(call):
    settings = call("here", "--rank", "4", "--alpha", "2.5", "--flip", "--no-bias", "--crop", "random", "--prompt", "a cat",
                    "--prompt", "a dog", "--folder", "there")
    assert settings.model_dump() == {"place": Path("here"), "rank": 4, "alpha": 2.5, "flip": True, "bias": False, "crop": "random",
                                     "prompt": ["a cat", "a dog"], "folder": Path("there"), "rows": {}}


def test_a_flag_with_the_default_value_still_counts_as_given(call):
    assert call("--rank", "16").model_fields_set == {"rank"}


def test_recipe_then_flags(call, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('rank = 8\nflip = true\nprompt = ["a mug"]\n[rows.lora]\nrank = 4\n', encoding="utf-8")
    settings = call("--recipe", str(recipe), "--rank", "2", "--no-flip")
    assert (settings.rank, settings.flip, settings.prompt, settings.rows) == (2, False, ["a mug"], {"lora": {"rank": 4}})


def test_unknown_recipe_key_names_the_nearest(call, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("rnak = 8\n", encoding="utf-8")
    with pytest.raises(Problem) as caught:
        call("--recipe", str(recipe))
    assert "'rnak'" in caught.value.what and "'rank'" in caught.value.why


def test_bounds_are_checked_after_parsing(call):
    with pytest.raises(Problem) as caught:
        call("--rank", "0")
    assert caught.value.what == "--rank does not accept '0'." or caught.value.what == "--rank does not accept 0."


@pytest.mark.parametrize(("kind", "wanted"), [
    (int, int), (int | None, int), (Path | None, Path), (list[str], list[str]), (list[int] | None, list[int]),
    (Literal["a", "b"], Literal["a", "b"]), (dict[str, int], None), (complex, str), (int | str, str),
])
def test_flag_types(kind, wanted):
    assert flag_type(kind) == wanted


def test_help_shows_unit_default_choices_and_groups(call, capsys):
    with pytest.raises(IndexError):
        call("--help")
    said = capsys.readouterr().out
    assert "inner width [16 numbers]" in said and "center|random" in said and "--[no-]flip" in said
    assert said.index("─ arguments") < said.index("─ method") < said.index("─ pictures") < said.index("─ run")
    assert "rows" not in said and max(map(len, said.splitlines())) <= 80
