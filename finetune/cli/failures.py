"""How things that went wrong are told: one block on stderr, and the exit code.

    0  done      1  an unexpected error      2  a refusal (Problem, or a wrong flag)      130  interrupted
"""

from __future__ import annotations

import errno
import json
import os
import sys
import textwrap
import traceback

from rich.console import Console
from rich.text import Text

from finetune.errors import Problem, nearest, out_of_memory
from finetune.runs.secrets import hide

REFUSED, UNEXPECTED, INTERRUPTED = 2, 1, 130
_PERMISSIONS = "Check its permissions, or choose another folder with --output."
_PATH = "Check the path."
REMEDIES = {  # what the system refuses on a right path -> what to do
    errno.ENOENT: _PATH, errno.EEXIST: "A file is there where a folder is wanted: choose another folder with --output.",
    errno.EACCES: _PERMISSIONS, errno.EPERM: _PERMISSIONS, errno.EROFS: "Its disk is read-only: choose another folder with --output.",
    errno.ENOSPC: "Make room on that disk, or choose a folder on another with --output.",
    errno.EDQUOT: "Your quota there is used up: make room, or choose another folder with --output.",
    errno.ENOTDIR: _PATH, errno.EISDIR: _PATH, errno.ENAMETOOLONG: "Choose a shorter name.", errno.ELOOP: "The link leads to itself: name what it should lead to.",
    errno.EMFILE: "Too many files are open: raise the limit with `ulimit -n 4096`.", errno.EIO: "The disk may be failing: save what matters elsewhere.",
}


def tell(error: BaseException, debug: bool) -> int:
    """Print the block for an error and return the exit code."""
    if debug and not isinstance(error, KeyboardInterrupt):
        sys.stderr.write(hide("".join(traceback.format_exception(error))))
    if isinstance(error, KeyboardInterrupt):
        block([("Stopped", "interrupted.")])
        return INTERRUPTED
    error = of_system(error) or error
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


def of_system(error: BaseException) -> Problem | None:
    """The refusal for what the system says of files and texts, and for memory; None for everything else."""
    if out_of_memory(error):
        return Problem("Memory ran out.", "Other programs may hold most of it.", "Close some, or run it on a machine with more.")
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        part = error.object[max(0, error.start - 20):error.end + 20]
        return Problem(f"The text {part.encode(errors='replace').decode()!r} is not Unicode.", "It came as bytes that are no UTF-8.",
                       "Type it in a terminal or a file that is UTF-8.")
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) and (place := _file_of(error)):
        return Problem(f"{place} is damaged.", f"It does not read as JSON: {error}.", "Bring it back from a copy, or make it again.")
    if type(error).__name__ == "SafetensorError":
        return Problem("A weights file is damaged, or something else under that name.", f"The safetensors library says: {error}.",
                       "Download or export it again; --debug shows which file was being read.")
    if isinstance(error, OSError) and error.errno in REMEDIES:
        place = error.filename2 or error.filename
        what = f"{os.fsdecode(place)} cannot be opened or written." if place else "A file cannot be opened or written."
        return Problem(what, f"The system says: {error.strerror}.", REMEDIES[error.errno])
    return None


def _file_of(error: BaseException) -> str:
    """The file that `runs.read_json` was reading when the error came, or "" where it came from elsewhere."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "read_json"]
    return str(frames[-1].f_locals.get("path", "")) if frames else ""


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
        shown = "".join(sign if sign.isprintable() else "\ufffd" for sign in hide(" ".join(text.split())))  # names come from strangers' files
        wrapped = textwrap.wrap(shown, min(console.width, 80) - indent, break_long_words=False,
                                break_on_hyphens=False)
        style = "bold red" if number == 0 else "bold"
        console.print(Text(f"{label + ':':>{indent - 1}} ", style).append("\n".join(
            part if first == 0 else " " * indent + part for first, part in enumerate(wrapped)), "default"), soft_wrap=True)
