"""From a tree of settings to a command: each declared setting becomes a flag, and only flags really given count."""

from __future__ import annotations

import inspect
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from rich.console import Console
from typer.core import TyperCommand

from finetune.cli.verbs import Verb
from finetune.settings import describe, resolve
from finetune.settings.fields import Setting

ARGUMENTS = "arguments"  # settings of this group are positional
PLAIN = (bool, int, float, str, Path)


def command(verb: Verb) -> TyperCommand:
    """Build the command of a verb. Imports the verb's module."""
    tree, body = verb.load()
    settings = [found for found in describe(tree) if flag_type(found.type) is not None]

    def call(ctx: typer.Context, **values: Any) -> None:
        given = {found.key: values[found.key] for found in settings
                 if ctx.get_parameter_source(found.key).name == "COMMANDLINE"}
        body(resolve(tree, given, values["recipe"], family_of), Console(highlight=False))

    parameters = [parameter(found) for found in settings]
    call.__signature__ = inspect.Signature([
        inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context), *parameters,
        option("recipe", str, "--recipe"), option("debug", bool, "--debug")])
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(verb.name, cls=VerbCommand, help=verb.summary)(call)
    built = typer.main.get_command(app)
    built.verb, built.tree = verb, tree
    return built


class VerbCommand(TyperCommand):
    """A command that prints its settings by group, in two columns that fit 80 characters."""

    verb: Verb
    tree: type[BaseModel]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Called by the parser for --help."""
        from finetune.cli.help import verb_help

        verb_help(self.verb, self.tree)


def family_of(model: str) -> str:
    """Family of a base model, found without importing torch."""
    from finetune.model import family_of as family

    return family(model)


def flag_type(kind: Any) -> Any:
    """The type a flag parses to: plain, Literal or list of these; None for what only a recipe can hold (tables)."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        parts = [part for part in get_args(kind) if part is not type(None)]
        return flag_type(parts[0]) if len(parts) == 1 else str
    if origin is Annotated:
        return flag_type(get_args(kind)[0])
    if origin is Literal or kind in PLAIN:
        return kind
    if origin in (list, tuple):
        inner = flag_type(get_args(kind)[0])
        return list[inner] if inner is not None else None
    return None if origin is dict or kind is dict else str


def parameter(found: Setting) -> inspect.Parameter:
    """One setting as a parameter of the command: None unless given."""
    kind = flag_type(found.type)
    if found.group == ARGUMENTS:
        needed = found.default is PydanticUndefined
        return inspect.Parameter(
            found.key, inspect.Parameter.KEYWORD_ONLY, default=inspect.Parameter.empty if needed else None,
            annotation=Annotated[kind if needed else kind | None, typer.Argument(metavar=found.key.upper())])
    name = f"{found.flag}/--no-{found.flag[2:]}" if kind is bool else found.flag
    return option(found.key, kind, name)


def option(key: str, kind: Any, name: str) -> inspect.Parameter:
    """An option that is None unless given."""
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None,
                             annotation=Annotated[kind | None, typer.Option(name)])
