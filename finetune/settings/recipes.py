"""Recipes: TOML files of settings. One per method and base family is packaged and applied by itself."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from finetune.errors import Problem


def recipe_folder() -> Path:
    """The packaged recipes: inside the package when installed, at the top level in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipes() -> dict[str, Path]:
    """All packaged recipes by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.toml"))}


def read_recipe(name: str | Path) -> dict[str, Any]:
    """Read a recipe by path, or by the name of a packaged one.

    Raises:
        Problem: no such file, or not valid TOML.
    """
    path = Path(name)
    if not path.is_file():
        path = recipes().get(str(name).removesuffix(".toml").removeprefix("recipes/"), path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem(f"There is no recipe {str(name)!r}.", "It is neither a file nor a packaged recipe.",
                      f"Packaged are: {', '.join(recipes()) or 'none'}.") from None
    except IsADirectoryError:
        raise Problem(f"The recipe {str(name)!r} is a folder.", "", "Name the .toml file in it.") from None
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8; numbers of thousands of digits, deep nesting
        raise Problem(f"The recipe {path} is not valid TOML: {error}.", "", "Write one `key = value` a line; text in quotes.") from None


def family_recipe(method: str, family: str) -> dict[str, Any]:
    """The packaged recipe `METHOD-FAMILY.toml`, or nothing where there is none."""
    path = recipe_folder() / f"{method}-{family}.toml"
    return read_recipe(path) if path.is_file() else {}
