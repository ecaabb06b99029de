# SPDX-License-Identifier: Apache-2.0
"""Every shipped run file composes as far as it can without its model: sections, names and values are right."""

from __future__ import annotations

from pathlib import Path

import pytest
from specforge_core.config.load import load_run_config
from specforge_core.config.validation import validate_section
from specforge_core.hooks.manager import PluginRegistry

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_understood(recipe: Path) -> None:
    loaded, registry = load_run_config(recipe), PluginRegistry.discover()
    config, wires = loaded.config, []
    if config.store and config.channel:
        wires.append((config.store, registry.part("feature-store", config.store["name"])))
        wires.append((config.channel, registry.part("ref-channel", config.channel["name"])))
    for values, spec in (
        (config.strategy, registry.strategy(config.strategy["name"])),
        (config.target, registry.target_engine(config.target["name"])),
        *wires,
    ):
        section, problems = validate_section(spec.config, values, locate=str)
        assert section is not None, problems
    assert str(recipe.name).startswith(loaded.config.strategy["name"])
    assert loaded.config.training.micro_batch_size <= loaded.config.training.global_batch_size


def test_there_are_recipes() -> None:
    assert len(RECIPES) == 10
