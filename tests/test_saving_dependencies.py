"""constraints-hashed.txt holds what constraints.txt says, every package with its hashes, and everything pyproject.toml asks for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def hashed() -> dict[str, tuple[str, list[str]]]:
    """Package -> version and hashes."""
    text = (ROOT / "constraints-hashed.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found = {}
    for line in lines:
        name, version = re.match(r"([\w.-]+)==([\w.+!-]+)", line).groups()
        found[plain(name)] = (version, re.findall(r"--hash=sha256:([0-9a-f]{64})(?![0-9a-f])", line))
    assert len(found) == len(lines) > 60
    return found


def test_every_package_has_hashes():
    assert [name for name, (_, hashes) in hashed().items() if not hashes or len(set(hashes)) != len(hashes)] == []


def test_both_files_have_the_same_versions():
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    pinned = {plain(name): version for name, version in (line.split("==") for line in lines)}
    found = {name: version for name, (version, _) in hashed().items()}
    assert {name: found.get(name) for name in pinned} == pinned


def test_everything_asked_for_is_pinned():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*told["dependencies"], *told["optional-dependencies"]["test"], *told["optional-dependencies"]["memory"]]
    assert {plain(re.match(r"[\w.-]+", one)[0]) for one in asked} - hashed().keys() == set()
