# SPDX-License-Identifier: Apache-2.0
"""The demo: a strategy ships a run file, a target engine makes a small real target and prompts; core joins them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from specforge_core.contracts import ConfigError, PluginError, Progress
from specforge_core.hooks.descriptors import DemoTarget, resolve
from specforge_core.hooks.manager import PluginRegistry
from specforge_core.run.directory import to_yaml, write_text

_ANSWERS_AT_ONCE = 128
"""The demo's target is small: a wide batch costs little more than one row."""


def default_cache() -> Path:
    """Where demo targets are kept: ``SPECFORGE_CACHE``, else the user's cache directory."""
    if "SPECFORGE_CACHE" in os.environ:
        return Path(os.environ["SPECFORGE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "specforge"


def choose_strategy(registry: PluginRegistry, name: str | None) -> str:
    """The strategy to demonstrate: the named one, or the only one installed.

    :raises PluginError: none is installed, or several are and none was named.
    """
    if name is not None:
        return name
    names = registry.names("strategy")
    if not names:
        raise PluginError(
            "no strategy is installed, so there is nothing to demonstrate",
            hint="pip install a strategy and a target engine; `specforge plugins` lists what is installed",
        )
    if len(names) > 1:
        raise PluginError(f"several strategies are installed: {', '.join(names)}", hint="say specforge demo NAME")
    return names[0]


@dataclass(frozen=True, slots=True)
class DemoRun:
    """Two run files: the target answers the prompts by the first, a draft is trained on its answers by the second."""

    answers: Path
    training: Path


def write_demo_run(
    registry: PluginRegistry, strategy: str, *, directory: Path, cache: Path, progress: Progress
) -> DemoRun:
    """Make the demo's target (or find it in the cache) and write the demo's run files.

    :raises PluginError: the strategy ships no demo, or the engine it wants makes no target for one.
    :raises ConfigError: ``directory`` cannot be written.
    """
    spec = registry.strategy(strategy)
    if not spec.demo:
        raise PluginError(f"strategy {strategy!r} ships no demo")
    package, _, resource = spec.demo.partition(":")
    run_file = yaml.safe_load(files(package).joinpath(resource).read_text(encoding="utf-8"))
    engine = registry.target_engine(run_file["target"]["name"])
    if not engine.demo:
        raise PluginError(f"target engine {engine.name!r} makes no target for a demo")
    try:
        directory.mkdir(parents=True, exist_ok=True)  # now: making the target takes minutes
    except OSError as error:
        hint = "name another place with --directory"
        raise ConfigError(f"cannot be written: {error.strerror}", where=str(directory), hint=hint) from error
    target: DemoTarget = resolve(engine.demo)(cache, progress)
    run_file["run"] = {"directory": str(directory), **run_file.get("run", {})}
    run_file["target"] |= target.section
    answered = target.train_prompts.parent / "answers"  # beside the prompts: whoever uses the target uses them too
    made = {"output": str(answered), "max_tokens": target.answer_tokens, "batch_size": _ANSWERS_AT_ONCE}
    sources = {"train": [str(target.train_prompts)], "eval": [str(target.eval_prompts)]}
    rows = {"train": [str(answered / "train")], "eval": [str(answered / "eval")]}
    demo = DemoRun(directory / "answers.yaml", directory / "demo.yaml")
    given = run_file.get("data", {})
    write_text(demo.answers, to_yaml({**run_file, "data": {**given, **sources}, "regenerate": made}))
    write_text(demo.training, to_yaml({**run_file, "data": {**rows, **given}}))
    return demo
