"""Recipes: whole journeys written with the public API only, to run as they are or to copy and change."""

from __future__ import annotations

from ._run import RECIPES, run_recipe

__all__ = ["RECIPES", "run_recipe"]
