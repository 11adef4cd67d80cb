"""How things that went wrong are told: one block on stderr, and the exit code.

    0  done      1  an unexpected error      2  a refusal (Problem, or a wrong flag)      130  interrupted
"""

from __future__ import annotations

import textwrap
import traceback

from rich.console import Console
from rich.text import Text

from finetune.errors import Problem, nearest

REFUSED, UNEXPECTED, INTERRUPTED = 2, 1, 130


def tell(error: BaseException, debug: bool) -> int:
    """Print the block for an error and return the exit code."""
    if debug and not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        block([("Stopped", "interrupted.")])
        return INTERRUPTED
    if isinstance(error, Problem):
        block([("Problem", error.what), ("Why", error.why), ("Fix", error.fix)])
        return REFUSED
    if hasattr(error, "format_message"):  # what the command line parser refuses
        block(usage(error))
        return REFUSED
    message = str(error).strip() or "no message"
    fix = "" if debug else "Run the same command again with --debug to see where it happened."
    block([("Error", f"{type(error).__name__}: {message}"), ("Fix", fix)])
    return UNEXPECTED


def usage(error: BaseException) -> list[tuple[str, str]]:
    """The parser's refusal in our words: what, nearest flag, where the help is."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "finetune"
    option = getattr(error, "option_name", None)
    known = [flag for param in context.command.params for flag in param.opts] if context else []
    parameter = getattr(error, "param", None)
    if option and "No such option" in error.format_message():
        what, why = f"{path} has no option {option}.", nearest(option, known)
    elif parameter is not None and getattr(error, "message", ""):
        name = parameter.opts[0] if parameter.opts[0].startswith("--") else parameter.opts[0].upper()
        what, why = f"{name}: {error.message.removeprefix('Value error, ')}", ""
    else:
        what, why = error.format_message(), ""
    return [("Problem", what), ("Why", why), ("Fix", f"`{path} --help` lists what it takes.")]


def block(lines: list[tuple[str, str]]) -> None:
    """Print `Label: text` lines, aligned, wrapped at 80 columns or less."""
    console = Console(stderr=True, highlight=False)
    indent = max(len(label) for label, text in lines if text) + 2
    for number, (label, text) in enumerate(line for line in lines if line[1]):
        wrapped = textwrap.wrap(" ".join(text.split()), min(console.width, 80) - indent, break_long_words=False,
                                break_on_hyphens=False)
        style = "bold red" if number == 0 else "bold"
        console.print(Text(f"{label + ':':>{indent - 1}} ", style).append("\n".join(
            part if first == 0 else " " * indent + part for first, part in enumerate(wrapped)), "default"), soft_wrap=True)
