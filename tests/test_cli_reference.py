"""docs/reference.md is what the settings say today."""

from __future__ import annotations

from finetune.cli import reference
from finetune.cli.verbs import verbs
from finetune.settings import describe


def test_reference_page_is_up_to_date():
    assert reference.DOCUMENT.read_text(encoding="utf-8") == reference.document(), "Run `make docs` and commit docs/reference.md."


def test_every_setting_of_every_verb_is_in_it():
    page = reference.document()
    for verb in verbs().values():
        assert f"## `finetune {verb.name}`" in page
        for found in describe(verb.load()[0]):
            assert any(name in page for name in (f"`{found.flag}`", f"`{found.key.upper()}`", f"`[{found.key}.NAME]`")), found.key
