"""One typed tree of settings: recipe key, flag, default, unit, help and reference page come from the same line."""

from finetune.settings.fields import describe, setting
from finetune.settings.recipes import family_recipe, read_recipe, recipe_folder, recipes
from finetune.settings.resolve import resolve
from finetune.settings.tree import RunSettings, TrainSettings

__all__ = [
    "RunSettings", "TrainSettings", "describe", "family_recipe", "read_recipe", "recipe_folder", "recipes", "resolve",
    "setting",
]
