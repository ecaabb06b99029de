# SPDX-License-Identifier: Apache-2.0
"""Plugins that are missing, disabled, in conflict, incompatible or broken. Their distributions are real, on disk."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bad_input import BadInput, Workshop
from fake_distributions import STRATEGY, install, install_strategy, install_target
from specforge_core.hooks.discovery import list_entries


def _site(w: Workshop):
    """A place for distributions on ``sys.path`` for this row; the test takes it off again."""
    site = w.root / "site"
    site.mkdir()
    sys.path.insert(0, str(site))
    return site


def _plan(name: str, w: Workshop, *options: str) -> Sequence[str]:
    return [*options, "plan", w.run_file(strategy={"name": name, "ttt_steps": None, "draft_vocab_size": None})]


def _conflict(w: Workshop) -> Sequence[str]:
    site = _site(w)
    install_strategy(site, "first-offer", "twice")
    install_strategy(site, "second-offer", "twice")
    return _plan("twice", w)


def _broken(w: Workshop) -> Sequence[str]:
    source = {"raises_on_import": "raise RuntimeError('compiled for another machine')\n"}
    groups = {"specforge.strategies": {"fragile": "raises_on_import"}}
    install(_site(w), "fragile-offer", groups=groups, modules=source)
    return _plan("fragile", w)


def _incompatible(w: Workshop) -> Sequence[str]:
    install_strategy(_site(w), "future-offer", "future", requires="specforge-core>=99")
    return _plan("future", w)


def _misnamed(w: Workshop) -> Sequence[str]:
    source = {"misnamed_offer": STRATEGY.replace("{name}", "another")}
    install(_site(w), "misnamed-offer", groups={"specforge.strategies": {"mine": "misnamed_offer"}}, modules=source)
    return _plan("mine", w)


def _factory_missing(w: Workshop) -> Sequence[str]:
    source = {"hollow_offer": STRATEGY.replace("{name}", "hollow").replace("json:loads", "hollow_parts:Strategy")}
    install(_site(w), "hollow-offer", groups={"specforge.strategies": {"hollow": "hollow_offer"}}, modules=source)
    run_file = w.run_file(strategy={"name": "hollow", "ttt_steps": None, "draft_vocab_size": None}, data={"eval": None})
    return ["run", run_file]


def _misfit(w: Workshop) -> Sequence[str]:
    site = _site(w)
    install_target(site, "post-offer", "post-only")
    install_strategy(site, "wish-offer", "wish")
    strategy = {"name": "wish", "norm": "pre", "layers": [9], "ttt_steps": None, "draft_vocab_size": None}
    return ["plan", w.run_file(strategy=strategy, target={"name": "post-only", "path": None})]


def _demo_of_nothing(w: Workshop) -> Sequence[str]:
    strategies = [entry.name for entry in list_entries() if entry.kind == "strategy"]
    without = [option for name in strategies for option in ("--no-plugin", f"strategy:{name}")]
    return [*without, "demo", "--directory", "out", "--cache", "cache"]


def _no_demo(w: Workshop) -> Sequence[str]:
    install_strategy(_site(w), "quiet-offer", "quiet")
    return ["demo", "quiet", "--directory", "out", "--cache", "cache"]


TABLE = [
    BadInput(
        "unknown strategy",
        lambda w: _plan("eagle4", w),
        (
            "run.yaml: strategy.name (line ",
            "no strategy 'eagle4' is installed",
            "did you mean 'eagle3'?",
        ),
    ),
    BadInput(
        "unknown target engine",
        lambda w: ["capture", w.run_file(target={"name": "triton"})],
        ("run.yaml: target.name (line ", "no target-engine 'triton'", "`specforge plugins` lists"),
    ),
    BadInput(
        "unknown store",
        lambda w: ["plan", w.run_file(store={"name": "tape"})],
        ("run.yaml: store.name (line ", "no feature-store 'tape'", "`specforge plugins` lists"),
    ),
    BadInput(
        "unknown channel",
        lambda w: ["plan", w.run_file(channel={"name": "mail"})],
        ("run.yaml: channel.name (line ", "no ref-channel 'mail'", "`specforge plugins` lists"),
    ),
    BadInput(
        "no strategy named",
        lambda w: ["plan", w.run_file(strategy={"name": None})],
        ("run.yaml: strategy.name", "is missing", "one of:", "eagle3"),
    ),
    BadInput(
        "disabled plugin chosen",
        lambda w: ["--no-plugin", "eagle3", "plan", w.run_file()],
        ("run.yaml: strategy.name (line ", "'eagle3' of specforge-eagle3", "disabled as 'eagle3'", "enable it"),
    ),
    BadInput(
        "unknown plugin disabled",
        lambda w: ["--no-plugin", "eagel3", "plugins"],
        ("'eagel3'", "did you mean 'eagle3'?"),
    ),
    BadInput(
        "two distributions offer one name",
        _conflict,
        ("'twice'", "first-offer 1.0", "second-offer 1.0", "--no-plugin first-offer:twice"),
    ),
    BadInput(
        "broken plugin chosen",
        _broken,
        ("'fragile' of fragile-offer 1.0 is broken", "RuntimeError: compiled for another machine", "reinstall"),
    ),
    BadInput(
        "incompatible plugin chosen",
        _incompatible,
        ("'future' of future-offer 1.0", "specforge-core>=99", "pip install"),
    ),
    BadInput(
        "plugin of another name", _misnamed, ("misnamed-offer 1.0", "named 'mine'", "offers 'another'", "reinstall")
    ),
    BadInput("plugin without its parts", _factory_missing, ("hollow_parts", "cannot be loaded", "reinstall")),
    BadInput(
        "parts that do not fit",
        _misfit,
        ("[9]", "layers 0 to 3", "norm 'pre'", "target engine 'post-only' captures post", "change"),
    ),
    BadInput("plugin to show unknown", lambda w: ["plugins", "show", "eagle"], ("'eagle'", "'eagle3'?")),
    BadInput("plugin to check unknown", lambda w: ["plugins", "check", "eagle"], ("'eagle'", "'eagle3'?")),
    BadInput(
        "demo of an unknown strategy",
        lambda w: ["demo", "eagle4", "--directory", "out", "--cache", "cache"],
        ("no strategy 'eagle4' is installed", "did you mean 'eagle3'?"),
    ),
    BadInput(
        "demo of nothing",
        _demo_of_nothing,
        ("no strategy is installed", "pip install"),
    ),
    BadInput(
        "demo with a file for its cache",
        lambda w: ["demo", "eagle3", "--directory", "out", "--cache", w.write("file", "x")],
        ("file", "cannot be written", "--cache"),
    ),
    BadInput(
        "demo with a file for its directory",
        lambda w: ["demo", "eagle3", "--directory", w.write("file", "x"), "--cache", "cache"],
        ("file: cannot be written", "--directory"),
    ),
    BadInput("demo that is not shipped", _no_demo, ("'quiet' ships no demo",)),
]
