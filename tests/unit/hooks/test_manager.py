# SPDX-License-Identifier: Apache-2.0
"""Discovery over real metadata on disk: what is listed, what is refused, and what a broken plugin cannot break."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import pytest
from fake_distributions import STRATEGY, install, install_strategy
from specforge_core.contracts import PluginError
from specforge_core.hooks.descriptors import resolve
from specforge_core.hooks.discovery import PluginEntry, list_entries
from specforge_core.hooks.manager import PluginRegistry

_numbers = itertools.count()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of installed distributions, first on the path."""
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(str(directory))
    return directory


@pytest.fixture
def unique() -> str:
    """A distribution's name that no other test imported a module of."""
    return f"fake-plugin-{next(_numbers)}"


def entry(name: str, entries: list[PluginEntry] | None = None) -> PluginEntry:
    found = [item for item in entries or list_entries() if item.name == name]
    assert len(found) == 1
    return found[0]


def test_listing_reads_metadata_and_imports_nothing(site: Path, unique: str) -> None:
    install_strategy(site, unique, "fancy", modules={unique.replace("-", "_"): "raise RuntimeError('imported')"})
    found = entry("fancy")
    assert (found.kind, found.distribution, found.version, found.status) == ("strategy", unique, "1.0", "ok")
    assert found.requires == "specforge-core>=0.1"


def test_order_does_not_depend_on_the_path(site: Path) -> None:
    for name in ("zeta", "alpha"):
        install_strategy(site, f"dist-{name}", name)
    names = [item.name for item in list_entries() if item.kind == "strategy"]
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("origin", "shown"),
    [
        (None, "index"),
        ({"url": "file:///src/x", "dir_info": {"editable": True}}, "editable /src/x"),
        ({"url": "https://h/r.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "https://h/r.git@abc"),
        ({"url": "file:///w/x.whl", "archive_info": {}}, "file:///w/x.whl"),
        ("{broken", "unknown (direct_url.json is malformed)"),
        ("[1]", "unknown (direct_url.json is malformed)"),
    ],
)
def test_origin_follows_pep_610(site: Path, unique: str, origin: object, shown: str) -> None:
    install_strategy(site, unique, "fancy", origin=origin)
    assert entry("fancy").origin == shown


def test_unmet_core_requirement_is_incompatible_and_refused(site: Path, unique: str) -> None:
    install_strategy(site, unique, "fancy", requires="specforge-core>=99")
    assert entry("fancy").status == "incompatible"
    with pytest.raises(PluginError, match=r"fancy.*1\.0 requires specforge-core>=99"):
        PluginRegistry.discover().strategy("fancy")


def test_two_distributions_with_one_name_are_a_conflict_until_settled(site: Path) -> None:
    install_strategy(site, "conflict-a", "fancy", version="1.5")
    install_strategy(site, "conflict-b", "fancy", version="2.5")
    registry = PluginRegistry.discover()
    assert [item.status for item in registry.entries() if item.name == "fancy"] == ["shadowed", "shadowed"]
    with pytest.raises(PluginError) as caught:
        registry.strategy("fancy")
    for part in ("conflict-a 1.5", "conflict-b 2.5", "--no-plugin conflict-a:fancy", "pip uninstall"):
        assert part in str(caught.value)
    settled = PluginRegistry.discover(["conflict-a:fancy"])
    assert settled.strategy("fancy").name == "fancy"
    assert settled.provenance([("strategy", "fancy")])["strategy:fancy"]["distribution"] == "conflict-b"


def test_disabled_plugin_is_refused_and_unknown_names_are_errors(site: Path, unique: str) -> None:
    install_strategy(site, unique, "fancy")
    with pytest.raises(PluginError, match="disabled as 'fancy'"):
        PluginRegistry.discover(["fancy"]).strategy("fancy")
    with pytest.raises(PluginError, match="did you mean 'fancy'"):
        list_entries(["fanzy"])
    assert entry("fancy", list_entries([unique])).status == "disabled"


def test_disabling_by_kind_leaves_the_namesake_alone() -> None:
    found = [item for item in list_entries(["feature-store:file"]) if item.name == "file"]
    assert {item.kind: item.status for item in found} == {"feature-store": "disabled", "ref-channel": "ok"}


def test_stale_egg_info_does_not_hide_the_distribution(tmp_path: Path, site: Path, unique: str) -> None:
    install_strategy(tmp_path / "real", unique, "fancy")
    install(site, unique, groups={}, modules={}, version="0.1", folder="egg-info")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path / "real"))
        patch.syspath_prepend(str(site))
        found = entry("fancy")
    assert found.version == "1.0"
    assert "0.1 in" in found.detail


def test_metadata_that_is_no_metadata_hides_nobody_else(site: Path, unique: str) -> None:
    install_strategy(site, unique, "fancy")
    nameless = site / "nameless-1.0.dist-info"
    nameless.mkdir()
    (nameless / "entry_points.txt").write_text("[specforge.strategies]\nnameless = somewhere\n")
    groups = {"specforge.strategies": {"lost": "no_such_module", "odd": "not a module"}}
    install(site, f"{unique}-malformed", groups=groups, modules={})
    entries = list_entries()
    assert entry("fancy", entries).status == "ok"
    assert entry("nameless", entries).status == "broken"
    assert "no_such_module" in entry("lost", entries).detail
    assert "not a module" in entry("odd", entries).detail


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("raise SystemExit(3)", "SystemExit"),
        ("import no_such_dependency", "no_such_dependency"),
        ("x = 1", "offers nothing"),
        (STRATEGY.replace("{name}", "other"), "named 'fancy'.*offers 'other'"),
        (STRATEGY.replace("{name}", "fancy").replace("@hookimpl\n", ""), "not marked with @hookimpl"),
        (STRATEGY.replace("def specforge_strategies", "def specforge_strategys"), "specforge_strategys"),
        (STRATEGY.replace("def specforge_strategies", "def specforge_ref_channels"), "no entry point"),
        (STRATEGY.replace("def specforge_strategies()", "def specforge_strategies(nothing)"), "nothing"),
        ("from specforge_core import hookimpl\n@hookimpl\ndef specforge_strategies():\n    1 / 0", "ZeroDivisionError"),
        ("from specforge_core import hookimpl\n@hookimpl\ndef specforge_strategies():\n    return [3]", "int"),
    ],
)
def test_whatever_a_plugin_does_wrong_names_its_distribution(
    site: Path, unique: str, source: str, complaint: str
) -> None:
    install_strategy(site, unique, "fancy", modules={unique.replace("-", "_"): source})
    registry = PluginRegistry.discover()
    with pytest.raises(PluginError, match=complaint) as caught:
        registry.strategy("fancy")
    assert f"{unique} 1.0" in str(caught.value)
    assert registry.feature_store("file").name == "file"


@pytest.mark.parametrize(
    "name", ["wanted", "../x", "x; rm -rf /", "\x1b[2J", "redis://:wonderful-secret@h", "eagle3-pro"]
)
def test_a_missing_part_never_advises_to_install_what_was_typed(site: Path, unique: str, name: str) -> None:
    install_strategy(site, unique, "fancy")
    registry = PluginRegistry.discover()
    for ask in (registry.strategy, registry.feature_store, registry.ref_channel, registry.target_engine):
        with pytest.raises(PluginError, match=r"no [a-z-]+ .* is installed \(") as caught:
            ask(name)
        assert name not in caught.value.hint
        assert caught.value.hint
        assert "wonderful-secret" not in str(caught.value)
        assert "\x1b" not in str(caught.value)


def test_a_part_of_this_project_that_is_not_installed_says_how_it_is() -> None:
    registry = PluginRegistry([])
    for name in ("eagle3", "eagle4", "eagl3"):
        with pytest.raises(PluginError) as caught:
            registry.strategy(name)
        assert caught.value.hint.endswith("pip install specforge-eagle3")
    with pytest.raises(PluginError, match=r"none is installed.*pip install specforge-mooncake-store"):
        registry.feature_store("mooncake")


def test_entry_points_that_share_a_module_register_it_once() -> None:
    registry = PluginRegistry.discover()
    assert {registry.feature_store(name).name for name in ("file", "memory")} == {"file", "memory"}
    assert registry.ref_channel("file").name == "file"


OBSERVER = """\
from specforge_core import hookimpl

seen = []

@hookimpl
def specforge_window_trained(step, metrics):
    seen.append((step, metrics))
"""


def test_a_failing_observer_is_reported_once_and_leaves_the_others(
    site: Path, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad, broken = (f"{unique}-{word}".replace("-", "_") for word in ("good", "bad", "broken"))
    sources = {good: OBSERVER, bad: OBSERVER.replace("seen.append", "1 / 0, "), broken: "raise ValueError('no')"}
    for module, source in sources.items():
        install(site, module, groups={"specforge.observers": {module: module}}, modules={module: source})
    with caplog.at_level(logging.WARNING):
        observers = PluginRegistry.discover().observers()
        observers.window_trained("run", 1, {"loss": 2.0})
        observers.window_trained("run", 2, {"loss": 1.0})
    assert observers.names == [good]
    assert len(caplog.records) == 2
    module = __import__(good)
    assert module.seen == [(1, {"loss": 2.0}), (2, {"loss": 1.0})]


ENDINGS = [
    "sys.exit(0)",
    "sys.exit('bye')",
    "raise KeyboardInterrupt",
    "raise GeneratorExit",
    "raise BaseException('x')",
]
ENDINGS += ["raise Unspeakable", "raise RuntimeError('redis://:wonderful-secret@h')", "raise StopIteration"]
PRELUDE = """\
import sys
class Unspeakable(Exception):
    def __str__(self): sys.exit(0)
"""


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_observer_can_end_nothing(site: Path, unique: str, caplog: pytest.LogCaptureFixture, ending: str) -> None:
    good, bad, broken = (f"{unique}-{word}".replace("-", "_") for word in ("good", "bad", "broken"))
    meddling = f"{OBSERVER}    metrics.clear()\n    {ending}\n"
    sources = {good: OBSERVER, bad: PRELUDE + meddling, broken: PRELUDE + ending}
    for module, source in sources.items():
        install(site, module, groups={"specforge.observers": {module: module}}, modules={module: source})
    with caplog.at_level(logging.WARNING):
        observers = PluginRegistry.discover().observers()
        observers.window_trained("run", 1, {"loss": 2.0})
        observers.window_trained("run", 2, {"loss": 1.0})
    assert observers.names == [good]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    for name in (bad, broken):
        assert any(f"{name.replace('_', '-')} 1.0" in message for message in messages)
    assert "wonderful-secret" not in "".join(messages)
    assert __import__(good).seen == [(1, {"loss": 2.0}), (2, {"loss": 1.0})], "nobody's metrics were changed"


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("place", ["import", "hook", "attribute", "result"])
def test_a_part_that_ends_the_process_is_broken(site: Path, unique: str, ending: str, place: str) -> None:
    body = STRATEGY.replace("{name}", "fancy")
    sources = {
        "import": ending,
        "hook": body.replace("    return [Str", f"    {ending}\n    return [Str"),
        "attribute": f"def __getattr__(name):\n    {ending}\ndef __dir__(): return ['specforge_strategies']",
        "result": body.replace(
            "    return [Str", f"    def made():\n        {ending}\n        yield\n    return made(), [Str"
        ),
    }
    install_strategy(site, unique, "fancy", modules={unique.replace("-", "_"): PRELUDE + sources[place]})
    registry = PluginRegistry.discover()
    for _ in range(2):
        with pytest.raises(PluginError, match="is broken") as caught:
            registry.strategy("fancy")
        assert f"{unique} 1.0" in str(caught.value)
        assert "wonderful-secret" not in str(caught.value)


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_a_descriptor_names_may_not_end_the_process_either(site: Path, unique: str, ending: str) -> None:
    (site / f"{unique.replace('-', '_')}.py").write_text(PRELUDE + ending)
    with pytest.raises(PluginError, match="cannot be loaded"):
        resolve(f"{unique.replace('-', '_')}:Strategy")
