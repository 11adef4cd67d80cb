"""The command group: verbs are imported when they are called, failures are told in one place."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from finetune import __version__
from finetune.cli import failures
from finetune.cli.flags import command
from finetune.cli.short_of_memory import guarded
from finetune.cli.verbs import find, verbs


class LazyGroup(TyperGroup):
    """A group that knows its verbs by name and imports one only when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names, for completion."""
        return list(verbs())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import and build one verb; an unknown name is refused with the nearest one."""
        return command(guarded(find(cmd_name)))

    def invoke(self, ctx: Any) -> Any:
        """Run the verb. The parser would turn an interruption into an exit code without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Exit(failures.tell(error, debug=False)) from error

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Called by the parser for --help."""
        from finetune.cli.help import group_help

        group_help(verbs())


def show_version(wanted: bool | None) -> None:
    """Print the version and stop."""
    if wanted:
        typer.echo(f"finetune {__version__}")
        raise typer.Exit()


def build() -> Any:
    """The whole command line as one parser."""
    app = typer.Typer(cls=LazyGroup, add_completion=False, pretty_exceptions_enable=False)

    @app.callback()
    def root(version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True)] = False) -> None:
        """Four ways to teach Stable Diffusion a subject."""

    return typer.main.get_command(app)


def run(args: Sequence[str] | None = None) -> int:
    """Parse, run the verb, and return the exit code."""
    words = list(sys.argv[1:] if args is None else args) or ["--help"]
    try:
        code = build().main(words, prog_name="finetune", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        return failures.tell(error, debug="--debug" in words)
