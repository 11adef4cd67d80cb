"""Everything docs/comparison.md says, by one command:

    python docs/comparison/run.py WORK --subjects 12 --seeds 3 --workers 2

Trains what WORK lacks (finished runs are kept, so it may be stopped and called again), then writes the summary
docs/comparison/results.json, the plots and docs/comparison.md from docs/comparison/template.md. `--write` only writes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune import runs

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


@dataclass(frozen=True)
class Study:
    """One call of `finetune compare`: its rows (a recipe's own tables), whose pictures (None: as the command says), how many of them, how many steps.

    Only the main question is asked with every training seed. `trained` names rows that the main question trains with the same settings.
    """

    methods: str
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    subjects: str | None = None
    pictures: int | None = None
    seeds: int | None = 1
    steps: int | None = None
    trained: dict[str, str] = field(default_factory=dict)


def vectors(count: int) -> dict[str, Any]:
    return {"method": "textual-inversion", "vectors": count}


def wired(transform: str, scope: str = "cross") -> dict[str, Any]:
    rate = {"learning_rate": 1e-3} if transform == "key,query" else {}  # as in recipes/compare-toybox.toml
    return {"method": "hypernetwork", "transform": transform, "scope": scope, **rate}


STUDIES: dict[str, Study] = {
    "main": Study("dreambooth,textual-inversion,lora,hypernetwork:key,value", seeds=None),
    "prior": Study("dreambooth,dreambooth-no-prior,lora,lora-prior", {
        "dreambooth-no-prior": {"method": "dreambooth", "prior": "none"}, "lora-prior": {"method": "lora", "prior": "images"}},
        trained={"dreambooth": "dreambooth", "lora": "lora"}),
    "style": Study("dreambooth,textual-inversion,lora,hypernetwork:key,value", subjects="blueprint,riso"),
    "rank": Study("rank-1,rank-4,rank-16,rank-64", {f"rank-{rank}": {"method": "lora", "rank": rank} for rank in (1, 4, 16, 64)},
                  trained={"rank-16": "lora"}),
    "layers": Study("cross,all", {"cross": {"method": "lora", "targets": "cross-attention"}, "all": {"method": "lora", "targets": "attention"}},
                    trained={"cross": "lora"}),
    "vectors": Study("vectors-1,vectors-2,vectors-4,vectors-8", {f"vectors-{count}": vectors(count) for count in (1, 2, 4, 8)},
                     trained={"vectors-1": "textual-inversion"}),
    "wiring": Study("kv-cross,kq-cross,qkv-cross,kv-all,kq-all,qkv-all", {
        "kv-cross": wired("key,value"), "kq-cross": wired("key,query"), "qkv-cross": wired("query,key,value"),
        "kv-all": wired("key,value", "all"), "kq-all": wired("key,query", "all"), "qkv-all": wired("query,key,value", "all")},
        trained={"kv-cross": "hypernetwork-key-value"}),
    "longer": Study("dreambooth", steps=600),
    **{f"pictures-{count}": Study("dreambooth,textual-inversion,lora", pictures=count,
                                  trained={row: row for row in ("dreambooth", "textual-inversion", "lora") if count == 5})
       for count in (1, 3, 5, 10)},
}


def recipe(study: Study) -> str:
    """The study's rows as a recipe of `finetune compare`."""
    lines = ['method = "compare"']
    for name, values in study.rows.items():
        lines += [f"[rows.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def share(work: Path, name: str, study: Study) -> None:
    """Copy what the main question trained with the same settings, pictures and seed."""
    for done in sorted((work / "main" / "cells").glob("*-s0/scores.json")):
        cell, subject = work / name / "cells" / done.parent.name, done.parent.name.removesuffix("-s0")
        for row, trained in study.trained.items():
            if (cell / row).exists():
                continue
            with runs.atomic_folder(cell / row) as fresh:
                shutil.copytree(done.parent / trained, fresh, dirs_exist_ok=True)
                settings = runs.read_json(fresh / "settings.json")
                settings["instance_dir"] = str(work / name / "pictures" / subject)  # the same pictures, in this study's folder
                runs.write_json(fresh / "settings.json", settings)


def train(work: Path, name: str, study: Study, given: argparse.Namespace) -> None:
    """One `finetune compare`; what is finished is kept."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    share(work, name, study)
    own = work / f"{name}.toml"
    own.write_text(recipe(study), encoding="utf-8")
    words = ["compare", "--methods", study.methods, "--recipe", own, "--output", folder, "--workers", given.workers,
             "--subjects", study.subjects or given.subjects, "--seeds", study.seeds or given.seeds, "--evaluation-seeds", 1]
    words += ["--pictures", study.pictures] if study.pictures else []
    words += ["--steps", study.steps] if study.steps else []
    subprocess.run([sys.executable, "-m", "finetune", *map(str, words)], check=True)


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--subjects", default="12", help="of every question but that of style: a number, or names")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds of the main question")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--write", action="store_true", help="train nothing, write from what is there")
    given = parser.parse_args()
    if not given.write:
        for name in given.only:
            train(given.work.resolve(), name, STUDIES[name], given)
    from write import write

    write(given.work, list(STUDIES))


if __name__ == "__main__":
    main()
