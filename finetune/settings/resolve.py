"""From declared defaults, family recipe, own recipe and flags to one resolved set of settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from finetune.errors import Problem, nearest
from finetune.settings.recipes import family_recipe, read_recipe

Tree = TypeVar("Tree", bound=BaseModel)


def resolve(tree: type[Tree], given: Mapping[str, Any], recipe: str | Path | None = None,
            family_of: Callable[[str], str] | None = None) -> Tree:
    """Settings of `tree`: later sources win: defaults, recipe of the base family, own recipe, given flags.

    Args:
        given: only what was really given (flags), by key.
        recipe: path or packaged name; its `method` key must agree with the tree's METHOD.
        family_of: base model name -> family ("toybox", "sd1", "sd2"), asked once to find the family recipe.

    Raises:
        Problem: unknown key (with the nearest name), wrong type or bound, recipe for another method.
    """
    own = dict(read_recipe(recipe)) if recipe else {}
    method = getattr(tree, "METHOD", "")
    wanted = own.pop("method", method)
    if method and wanted != method:
        raise Problem(f"The recipe {recipe} is for {wanted!r}, not for {method!r}.", "", f"Run `finetune {wanted} --recipe {recipe}`.")
    check_keys(tree, own, f"recipe {recipe}")
    check_keys(tree, given, "settings")
    base: dict[str, Any] = {}
    if family_of and method:
        model = given.get("model") or own.get("model") or tree.model_fields["model"].default
        base = family_recipe(method, family_of(model))
        base.pop("method", None)
        check_keys(tree, base, "family recipe")
    return build(tree, {**base, **own, **given})


def check_keys(tree: type[BaseModel], values: Mapping[str, Any], source: str) -> None:
    """Refuse keys the tree does not have, naming the nearest one it has."""
    for key in values:
        if key not in tree.model_fields:
            raise Problem(f"Unknown setting {key!r} in {source}.", nearest(key, tree.model_fields),
                          "`finetune COMMAND --help` lists them all.")


def build(tree: type[Tree], values: Mapping[str, Any]) -> Tree:
    """Validate, turning pydantic's first error into one sentence."""
    try:
        return tree(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
        flag = "--" + key.replace("_", "-")
        raise Problem(f"{flag} does not accept {first.get('input')!r}.", f"{first['msg']}.") from None
