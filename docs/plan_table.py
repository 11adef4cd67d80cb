"""Measure runs beside their plans and write the table of docs/plan.md.

    python docs/plan_table.py --model tiny=bases/tiny --model small=bases/small --pictures photos/ --run "lora tiny resolution=32" --run ...
    python docs/plan_table.py                      # the table again from docs/plan.json

A run is a method, a base's label and settings. Rows are kept in docs/plan.json; a run measured again replaces its row.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def main() -> None:
    """Measure what was asked for, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", default=[], help="LABEL=FOLDER")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--run", action="append", default=[], help="METHOD LABEL KEY=VALUE ...")
    options = parser.parse_args()
    models = dict(entry.split("=", 1) for entry in options.model)
    for text in options.run:
        method, label, *settings = text.split()
        keep(measured(method, label, models[label], options.pictures, dict(pair.split("=", 1) for pair in settings)))
    write()


def measured(method: str, label: str, model: str, pictures: Path, settings: dict[str, str]) -> dict[str, Any]:
    """One row."""
    from finetune.plan.reality import measure

    manifest = measure(method, model, pictures, **settings)
    return {"method": method, "base": label, "settings": " ".join(f"{key}={value}" for key, value in settings.items() if key != "steps"),
            "planned": manifest["planned"]["peak"], "measured": manifest["peak_memory_bytes"], "moment": manifest["planned"]["moment"]}


def keep(row: dict[str, Any]) -> None:
    """Put a row into docs/plan.json in place of an older one of the same run."""
    path = HERE / "plan.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    key = ("method", "base", "settings")
    rows = [old for old in rows if [old[name] for name in key] != [row[name] for name in key]] + [row]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def write() -> None:
    """The table into docs/plan.md."""
    rows = json.loads((HERE / "plan.json").read_text(encoding="utf-8"))
    order = {"tiny": 0, "small": 1, "sd15": 2}
    rows.sort(key=lambda row: (order.get(row["base"], 9), row["method"], row["settings"]))
    lines = ["| base | method | settings | planned, MB | measured, MB | off |", "|---|---|---|---|---|---|"]
    lines += [f"| {row['base']} | {row['method']} | {row['settings']} | {row['planned'] / 1e6:,.0f} | {row['measured'] / 1e6:,.0f} "
              f"| {row['planned'] / row['measured'] - 1:+.0%} |" for row in rows]
    path = HERE / "plan.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.index(BEGIN) + len(BEGIN)] + "\n" + "\n".join(lines) + "\n" + text[text.index(END):], encoding="utf-8")


if __name__ == "__main__":
    main()
