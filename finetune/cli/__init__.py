"""Everything a user types. Imports nothing heavy until a verb needs it, so that help is instant."""

from __future__ import annotations

from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    from finetune.cli import quiet

    quiet.hush()
    quiet.hide()
    from finetune.cli.app import run

    raise SystemExit(run(args))
