"""Recipes: named files of settings for the trainer. Each YAML file in the folder recipes/ is one. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from open_lm.errors import ConfigError
from open_lm.system.names import user_file

FOLDER = Path(__file__).resolve().parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_recipe(recipe: str) -> str:
    """Return the file of a recipe, given by its name or as a YAML file. Raise ConfigError if there is none."""
    if recipe in recipe_names():
        return str(FOLDER / f"{recipe}.yaml")
    if recipe.endswith((".yaml", ".yml", ".json")) and user_file(recipe).is_file():
        return recipe
    raise ConfigError(f"--recipe: found {recipe!r}, expected {', '.join(recipe_names())} or a YAML file")
