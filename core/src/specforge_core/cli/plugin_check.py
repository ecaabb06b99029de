# SPDX-License-Identifier: Apache-2.0
"""Imports plugins in processes of their own, so that whatever they do happens there. ``python -m`` this file is one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

from specforge_core.contracts.errors import PluginError
from specforge_core.hooks.discovery import PluginEntry

_AT_ONCE = 2
_LAST_LINES = 3
_MARK = "specforge-plugin-check:"


def check_entries(
    entries: Sequence[PluginEntry], *, among: Sequence[PluginEntry], deadline: float
) -> list[PluginEntry]:
    """The entries with the status that importing them gave.

    :param among: everything installed; entries that share a module are registered together.
    :param deadline: seconds that each may take.
    """
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        return list(pool.map(lambda entry: _check_entry(entry, among, deadline), entries))


def _check_entry(entry: PluginEntry, among: Sequence[PluginEntry], deadline: float) -> PluginEntry:
    if entry.status != "ok":
        return entry
    siblings = [other for other in among if other.value == entry.value and other != entry]
    question = json.dumps([asdict(item) for item in (entry, *siblings)])
    command = [sys.executable, "-m", "specforge_core.cli.plugin_check"]
    try:
        child = subprocess.run(command, input=question, capture_output=True, text=True, timeout=deadline, check=False)
    except subprocess.TimeoutExpired:
        return replace(entry, status="broken", detail=f"did not finish importing within {deadline:g} s")
    answers = [line.removeprefix(_MARK) for line in child.stdout.splitlines() if line.startswith(_MARK)]
    if not answers:
        last = " | ".join(child.stderr.strip().splitlines()[-_LAST_LINES:])
        return replace(entry, status="broken", detail=f"the process ended with status {child.returncode}: {last}")
    answer = json.loads(answers[-1])
    if answer["problem"]:
        return replace(entry, status="broken", detail=answer["problem"])
    return replace(entry, detail=answer["remark"] or entry.detail)


def _probe(entries: Sequence[PluginEntry]) -> dict[str, str]:
    """Load the first entry here, then what its descriptor names, and say what is wrong.

    The others are those that share its module: their hooks are rightly there.
    """
    from specforge_core.hooks.descriptors import StrategySpec, TargetEngineSpec, resolve
    from specforge_core.hooks.manager import PluginRegistry

    entry, registry = entries[0], PluginRegistry(entries)
    try:
        if entry.kind == "observer":
            registry.load_observer(entry)
            return {"problem": "", "remark": ""}
        spec = registry.part(entry.kind, entry.name)
        remark = "its plugin module imports torch, which slows every command" if "torch" in sys.modules else ""
        paths = [spec.factory]
        if isinstance(spec, StrategySpec):
            paths += [path for path in (spec.golden,) if path]
        if isinstance(spec, TargetEngineSpec):
            paths.append(spec.tokenizer)
        for path in paths:
            resolve(path)
    except PluginError as error:
        return {"problem": error.message, "remark": ""}
    except (Exception, SystemExit) as error:  # noqa: BLE001  the factory's module is foreign code too
        return {"problem": f"{type(error).__name__}: {error}", "remark": ""}
    return {"problem": "", "remark": remark}


if __name__ == "__main__":
    answer = _probe([PluginEntry(**item) for item in json.load(sys.stdin)])
    print(f"\n{_MARK}{json.dumps(answer)}", flush=True)
