"""Tokens and passwords never go into logs, manifests, model cards or reports: whatever text goes there passes here first."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "(hidden)"
_WORD = r"(?:token|secret|passw(?:or)?d|api[-_]?key|access[-_]?key|credentials?)"
# What services put in front of their tokens: Hugging Face, GitHub, GitLab, OpenAI and others, Slack, Amazon, Weights & Biases' bare key has no mark.
_MARKED = re.compile(r"\b(?:hf_[A-Za-z0-9]{8,}|api_org_[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}|glpat-[\w-]{16,}"
                     r"|sk-[\w-]{16,}|xox[abpr]-[\w-]{10,}|AKIA[0-9A-Z]{16})")
_IN_ADDRESS = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^/\s@'\"]+@", re.IGNORECASE)
_IN_QUERY = re.compile(rf"(?P<name>[?&;](?:[\w.-]*{_WORD}|sig|signature|key|x-amz-(?:signature|credential|security-token))=)[^&\s'\"#]+", re.IGNORECASE)
_BEARER = re.compile(r"(?P<name>\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_FLAG = re.compile(rf"--?(?:[\w-]*[-_])?{_WORD}", re.IGNORECASE)
_ASSIGNED = re.compile(rf"(?P<name>(?:^|(?<=[\s,{{'\"]))(?:--?)?(?:[\w-]*[-_])?{_WORD}['\"]?\s*(?:=|:\s))\s*(?P<quote>['\"]?)[^\s'\",}}]+", re.IGNORECASE)
_VARIABLE = re.compile(rf".*{_WORD}", re.IGNORECASE)
SHORTEST = 8  # signs of an environment variable's value that is looked for in texts


def hide(text: str, assigned: bool = True) -> str:
    """The text without tokens, passwords in addresses, and values of environment variables whose names say they are secret.

    Args:
        assigned: hide what stands after "token=" or "password: " too; not in prompts and settings, where these are words.
    """
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and _VARIABLE.fullmatch(name) and value in text:
            text = text.replace(value, HIDDEN)
    text = _MARKED.sub(HIDDEN, text)
    text = _IN_ADDRESS.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _IN_QUERY.sub(rf"\g<name>{HIDDEN}", text)
    text = _BEARER.sub(rf"\g<name>{HIDDEN}", text)
    return _ASSIGNED.sub(rf"\g<name>\g<quote>{HIDDEN}", text) if assigned else text


def hide_in_command(words: Sequence[str]) -> str:
    """A command line as one text; what follows a flag such as --token is hidden too."""
    found, after = [], False
    for word in words:
        found.append(HIDDEN if after and not word.startswith("-") else hide(word))
        after = _FLAG.fullmatch(word) is not None
    return " ".join(found)


def hide_in(value: Any) -> Any:
    """Settings without them: every text in lists and tables."""
    if isinstance(value, str):
        return hide(value, assigned=False)
    if isinstance(value, Mapping):
        return {key: hide_in(part) for key, part in value.items()}
    return [hide_in(part) for part in value] if isinstance(value, (list, tuple)) else value
