# SPDX-License-Identifier: Apache-2.0
"""Imports plugins, and runs their contract suites, in processes of their own: whatever they do happens there.

``python -m`` this file is such a process; it answers with one marked line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from specforge_core.contracts.errors import PluginError
from specforge_core.hooks.discovery import PluginEntry

if TYPE_CHECKING:
    from specforge_core.hooks.descriptors import PartSpec

_AT_ONCE = 2
"""Each imports torch, which takes a core and some hundred megabytes."""
_LAST_LINES = 3
_MARK = "specforge-plugin-check:"

KEPT, BROKEN, NOT_APPLICABLE = "kept", "broken", "not applicable"


@dataclass(frozen=True, slots=True)
class CheckedPlugin:
    """An entry with the status that looking at it gave.

    :param contract: kit test → ``kept``, ``not applicable``, or ``broken: `` and what it said; empty: not run.
    :param remark: what else is worth knowing, such as why the contract suite was not run.
    """

    entry: PluginEntry
    contract: Mapping[str, str] = field(default_factory=dict)
    remark: str = ""

    def as_json(self) -> dict[str, object]:
        return {**self.entry.as_json(), "contract": dict(self.contract), "remark": self.remark}


def check_entries(
    entries: Sequence[PluginEntry], *, among: Sequence[PluginEntry], deadline: float, contract: bool
) -> list[CheckedPlugin]:
    """The entries with the status that importing them, and the contract suite where asked for, gave.

    :param among: everything installed; entries that share a module are registered together.
    :param deadline: seconds that each may take.
    """
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        return list(pool.map(lambda entry: _check_entry(entry, among, deadline, contract), entries))


def _check_entry(entry: PluginEntry, among: Sequence[PluginEntry], deadline: float, contract: bool) -> CheckedPlugin:
    if entry.status != "ok":
        return CheckedPlugin(entry)
    siblings = [other for other in among if other.value == entry.value and other != entry]
    question = json.dumps({"entries": [asdict(item) for item in (entry, *siblings)], "contract": contract})
    command = [sys.executable, "-P", "-m", "specforge_core.cli.plugin_check"]
    try:
        child = subprocess.run(command, input=question, capture_output=True, text=True, timeout=deadline, check=False)
    except subprocess.TimeoutExpired:
        return _broken(entry, f"did not finish within {deadline:g} s")
    answers = [line.removeprefix(_MARK) for line in child.stdout.splitlines() if line.startswith(_MARK)]
    if not answers:
        last = " | ".join(child.stderr.strip().splitlines()[-_LAST_LINES:])
        return _broken(entry, f"the process ended with status {child.returncode}: {last}")
    answer = json.loads(answers[-1])
    if answer["problem"]:
        return _broken(entry, answer["problem"])
    checked = CheckedPlugin(entry, answer["contract"], answer["remark"])
    failed = [test for test, ended in checked.contract.items() if ended.startswith(BROKEN)]
    problem = f"does not keep {len(failed)} of {len(checked.contract)} tests of its contract"
    return replace(checked, entry=_broken(entry, problem).entry) if failed else checked


def _broken(entry: PluginEntry, problem: str) -> CheckedPlugin:
    return CheckedPlugin(replace(entry, status="broken", detail=problem))


def _probe(entries: Sequence[PluginEntry], contract: bool) -> dict[str, object]:
    """Load the first entry here, then what its descriptor names, and say what is wrong.

    The others are those that share its module: their hooks are rightly there.
    """
    from specforge_core.hooks.descriptors import StrategySpec, TargetEngineSpec, resolve
    from specforge_core.hooks.foreign import describe_failure
    from specforge_core.hooks.manager import PluginRegistry

    entry, registry = entries[0], PluginRegistry(entries)
    try:
        if entry.kind == "observer":
            registry.load_observer(entry)
            return _answer()
        spec = registry.part(entry.kind, entry.name)
        remark = "its plugin module imports torch, which slows every command" if "torch" in sys.modules else ""
        paths = [spec.factory]
        if isinstance(spec, StrategySpec):
            paths += [path for path in (spec.golden,) if path]
        if isinstance(spec, TargetEngineSpec):
            paths.append(spec.tokenizer)
        for path in paths:
            resolve(path)
        return _run_contract(spec, remark) if contract else _answer(remark=remark)
    except PluginError as error:
        return _answer(problem=error.message)
    except BaseException as error:  # noqa: BLE001  the factory's module is foreign code too
        return _answer(problem=describe_failure(error))


def _run_contract(spec: PartSpec, remark: str) -> dict[str, object]:
    """The quick part of the kind's contract suite."""
    if find_spec("pytest") is None:
        why = "only imported: its contract suite needs pytest (pip install 'specforge-core[testing]')"
        return _answer(remark="; ".join(filter(None, (remark, why))))
    from specforge_core.testing.conformance import run_suite
    from specforge_core.testing.installed_part import suite_of

    suite = suite_of(spec)
    if suite is None:
        why = "only imported: its descriptor gives no example to run the contract suite with"
        return _answer(remark="; ".join(filter(None, (remark, why))))
    report = run_suite(suite, quick=True)
    contract = dict.fromkeys(report.passed, KEPT) | dict.fromkeys(report.skipped, NOT_APPLICABLE)
    contract |= {test: f"{BROKEN}: {_reason(said)}" for test, said in {**report.failed, **report.errors}.items()}
    return _answer(remark=remark, contract=dict(sorted(contract.items())))


def _reason(said: str) -> str:
    """The error of a test's report, on one line."""
    lines = [line.removeprefix("E").strip() for line in said.splitlines() if line.startswith("E ")]
    return " ".join(lines[:2]) or said.strip().splitlines()[-1]


def _answer(*, problem: str = "", remark: str = "", contract: Mapping[str, str] | None = None) -> dict[str, object]:
    return {"problem": problem, "remark": remark, "contract": contract or {}}


if __name__ == "__main__":
    question = json.load(sys.stdin)
    answer = _probe([PluginEntry(**item) for item in question["entries"]], question["contract"])
    print(f"\n{_MARK}{json.dumps(answer)}", flush=True)
