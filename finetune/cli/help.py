"""Help pages: settings by group in two columns, made to be read at 80 characters."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from finetune import __version__
from finetune.cli.flags import ARGUMENTS, flag_type
from finetune.cli.verbs import Verb
from finetune.settings import describe, family_recipe
from finetune.settings.fields import Setting

FLAG_COLUMN = 29
# What is particular to the verb first, what all share last.
ORDER = ("arguments", "what", "methods", "method", "stages", "pictures", "prompts", "training", "prior", "sampling",
         "evaluation", "memory", "speed", "run", "model")
METAVARS = {int: "INT", float: "NUMBER", str: "TEXT"}
COMMON = [
    ("--recipe FILE.toml", "settings from a file or a packaged recipe; flags win over it"),
    ("--debug", "show the traceback when something goes wrong"),
    ("--help", "this page"),
]


def page() -> Console:
    """A console as wide as the terminal, at most 100 columns: longer lines are hard to read."""
    console = Console(highlight=False)
    console.width = min(console.width, 100)
    return console


def group_help(verbs: dict[str, Verb]) -> None:
    """`finetune --help`: the verbs by panel."""
    console = page()
    console.print("\n[bold]finetune COMMAND[/] ...      one command's flags: [bold]finetune COMMAND --help[/]\n")
    console.print(Padding("Teach Stable Diffusion a subject from three to ten pictures, in four ways through one loop, "
                          "and see in one report which way to use.", (0, 1)))
    console.print()
    for panel in dict.fromkeys(verb.panel for verb in verbs.values()):
        table = columns(19)
        for verb in verbs.values():
            if verb.panel == panel:
                table.add_row(Text(verb.name, "bold cyan"), verb.summary)
        console.print(Panel(table, title=panel, title_align="left", border_style="dim"))
    console.print(Padding(Text.assemble("Start with  ", ("finetune compare --instance-dir photos/ --class-noun dog", "bold"),
                                        f"\nVersion {__version__}. No weights are downloaded unless --model names some."), (0, 1)))


def verb_help(verb: Verb, tree: type[BaseModel]) -> None:
    """`finetune VERB --help`: usage, summary, examples, then one panel per group of settings."""
    settings = [found for found in describe(tree) if flag_type(found.type) is not None]
    places = " ".join(placed(found) for found in settings if found.group == ARGUMENTS)
    console = page()
    console.print(f"\n[bold]finetune {verb.name}[/]{' ' + places if places else ''} [dim]--flags[/]\n", markup=True)
    console.print(Padding(verb.summary, (0, 1)))
    console.print()
    for example in verb.examples:
        console.print(Padding(Text(example, "cyan"), (0, 3)))
    if verb.examples:
        console.print()
    recipe = family_recipe(getattr(tree, "METHOD", ""), "toybox")
    for group in groups(settings):
        table = columns(FLAG_COLUMN)
        for found in settings:
            if found.group == group:
                table.add_row(flag_text(found), help_text(found, recipe))
        console.print(Panel(table, title=group, title_align="left", border_style="dim"))
    table = columns(FLAG_COLUMN)
    for flag, text in COMMON:
        name, _, metavar = flag.partition(" ")
        table.add_row(Text.assemble((name, "bold cyan"), (f" {metavar}", "yellow")), text)
    console.print(Panel(table, title="every command", title_align="left", border_style="dim"))


def columns(width: int) -> Table:
    """A borderless two-column table whose first column has a fixed width."""
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(width=width, overflow="fold")
    table.add_column(ratio=1, overflow="fold")
    return table


def groups(settings: list[Setting]) -> list[str]:
    """The groups that occur, in reading order."""
    found = list(dict.fromkeys(one.group for one in settings))
    return sorted(found, key=lambda group: ORDER.index(group) if group in ORDER else ORDER.index("evaluation"))


def placed(found: Setting) -> str:
    """How a positional setting is written in the usage line."""
    name = found.key.upper()
    return name if found.default is PydanticUndefined else f"\\[{name}]"


def flag_text(found: Setting) -> Text | Group:
    """The flag with what it takes; choices go on a line of their own."""
    if found.group == ARGUMENTS:
        first = Text(found.key.upper(), "bold cyan")
    elif flag_type(found.type) is bool:
        first = Text.assemble(("--", "bold cyan"), ("[no-]", "cyan"), (found.flag[2:], "bold cyan"))
    else:
        first = Text(found.flag, "bold cyan")
    metavar = Text(metavar_of(found), "yellow")
    if not metavar:
        return first
    if len(first) + 1 + len(metavar) <= FLAG_COLUMN:
        return first + Text(" ") + metavar
    return Group(first, Padding(metavar, (0, 0, 0, 2)))


def metavar_of(found: Setting) -> str:
    """What the flag takes: choices joined by bars, FILE or FOLDER for paths, INT, NUMBER or TEXT."""
    kind = flag_type(found.type)
    repeated = get_origin(kind) is list
    kind = get_args(kind)[0] if repeated else kind
    if kind is bool or found.group == ARGUMENTS and get_origin(kind) is not Literal:
        return ""
    if get_origin(kind) is Literal:
        name = "|".join(map(str, get_args(kind)))
    else:
        name = METAVARS.get(kind, "PATH")
    return name + (" ..." if repeated else "")


def help_text(found: Setting, recipe: dict[str, Any]) -> Text:
    """Help, then default and unit in dim: `[800 steps; toybox: 400]`."""
    text = Text(found.help)
    shown = shown_default(found)
    if found.key in recipe and plain(recipe[found.key]) != plain(found.default):
        shown = f"{shown}; toybox: {plain(recipe[found.key])}" if shown else f"toybox: {plain(recipe[found.key])}"
    return text.append(f" [{shown}]", "dim") if shown else text


def shown_default(found: Setting) -> str:
    """The default with its unit, empty where the help text says it in words or there is none."""
    if found.default is PydanticUndefined:
        return "required"
    if found.default is None or found.default in ([], (), "") or "[default:" in found.help:
        return ""
    unit = found.unit.removesuffix("s") if found.default == 1 else found.unit
    return f"{plain(found.default)} {unit}".strip()


def plain(value: Any) -> str:
    """A value as one writes it on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int) and abs(value) >= 100_000:
        return f"{value:_}"
    if isinstance(value, (list, tuple)):
        return ",".join(map(plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
