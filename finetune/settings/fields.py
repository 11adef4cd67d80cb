"""How a setting is declared, and how its declaration is read back for flags and documentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field


def setting(default: Any, help: str, *, unit: str = "", group: str = "training", flag: str = "", **limits: Any) -> Any:
    """Declare one setting of a pydantic model.

    Args:
        default: value when neither recipe nor flag gives one.
        help: one line for `--help` and the reference page; rule of thumb included where there is one.
        unit: what the number counts ("steps", "pixels", "bytes"), shown beside the default.
        group: heading under which `--help` and the reference page list it.
        flag: name on the command line where the setting's own cannot be a field's (`--json`).
        limits: pydantic's own bounds (ge, gt, le, lt).
    """
    return Field(default, description=help, json_schema_extra={"unit": unit, "group": group, "flag": flag}, **limits)


@dataclass(frozen=True)
class Setting:
    """One declared setting as the command line and the documentation see it."""

    key: str
    flag: str
    type: Any
    default: Any
    unit: str
    group: str
    help: str

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words where the setting is a Literal, else empty."""
        kinds = [self.type, *get_args(self.type)]
        return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())


def describe(model: type[BaseModel]) -> list[Setting]:
    """All settings of a model in order of declaration."""
    found = []
    for key, field in model.model_fields.items():
        extra = field.json_schema_extra or {}
        default = field.get_default(call_default_factory=True)
        flag = extra.get("flag") or "--" + key.replace("_", "-")
        found.append(Setting(key, flag, field.annotation, default, extra.get("unit", ""),
                             extra.get("group", "other"), field.description or ""))
    return found
