"""`finetune plan METHOD`: what a run will take, from its settings and the base's configurations alone."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, create_model
from rich.console import Console

from finetune.cli import quiet
from finetune.cli.compare_settings import reuse
from finetune.errors import Problem, nearest
from finetune.methods import get, names
from finetune.settings import TrainSettings, resolve, setting

ALL = "all"
OWN = ("method", "pictures", "calibrate", "table", "as_json")  # settings of the plan, not of the run


class Planned(TrainSettings):
    """What a plan is asked besides the run's own settings."""

    method: str = setting(..., "dreambooth, textual-inversion, lora, hypernetwork, or all", group="arguments")
    model: str = setting("toybox", "base model: sd15, sd21 or sdxl (nothing need be there), toybox, a diffusers folder, a hub id or a .safetensors checkpoint",
                         group="model")
    pictures: int = setting(5, "how many pictures there will be, when no --instance-dir is given", unit="pictures", group="plan", ge=1)
    calibrate: bool = setting(True, "spend ten seconds on how fast this machine is", group="plan")
    table: bool = setting(True, "compare the memory rungs and the other methods: up to a minute for large bases", group="plan")
    as_json: bool = setting(False, "print one JSON object instead of the page", group="plan", flag="--json")


def _with_every_method() -> type[BaseModel]:
    """The plan's settings and those of all methods; a setting two methods have is declared once."""
    fields: dict[str, Any] = {}
    for name in names():
        tree = get(name).Settings
        fields |= reuse(tree, tuple(key for key in tree.model_fields if key not in Planned.model_fields and key not in fields))
    return create_model("Settings", __base__=Planned, **fields)


Settings = _with_every_method()


def run(settings: Any, console: Console) -> None:
    """Predict, calibrate, print."""
    quiet.libraries()
    from finetune.cli import plan_page
    from finetune.cli.plan_rows import Planner

    chosen = list(names()) if settings.method == ALL else [settings.method]
    given = {key: getattr(settings, key) for key in settings.model_fields_set if key not in OWN}
    trees = {name: settings_of(name, given, lenient=settings.method == ALL) for name in chosen}
    others = {name: settings_of(name, given, lenient=True) for name in names() if name not in trees} if settings.table else {}
    planner = Planner(settings.model, settings.device, 10.0 if settings.calibrate else 0.0, settings.memory_limit, settings.pictures)
    with console.status("planning") if console.is_terminal and not settings.as_json else _nothing():
        found = planner.plans(trees, others, settings.table)
    if settings.as_json:
        console.print(json.dumps(found.as_dict(), indent=2), soft_wrap=True, markup=False)
    else:
        plan_page.show(found, console)


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def settings_of(name: str, given: dict[str, Any], lenient: bool) -> TrainSettings:
    """A method's settings as training would resolve them: defaults, the family's recipe, what was given.

    Args:
        lenient: leave out what this method does not have, as one plan for all methods must.

    Raises:
        Problem: there is no such method, or it does not have a setting that was given.
    """
    from finetune.plan.skeleton import family_of

    tree = get(name).Settings
    strange = [key for key in given if key not in tree.model_fields]
    if strange and not lenient:
        flag = "--" + strange[0].replace("_", "-")
        raise Problem(f"{name} has no setting {flag}.", nearest(strange[0], tree.model_fields), f"`finetune {name} --help` lists what it has.")
    own = {key: value for key, value in given.items() if key not in strange}
    if name == "textual-inversion" and lenient:
        own.pop("prior", None)
    return resolve(tree, {"class_noun": "dog", **own}, None, family_of)
