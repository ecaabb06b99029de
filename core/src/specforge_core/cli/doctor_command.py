# SPDX-License-Identifier: Apache-2.0
"""``doctor``: what this machine and environment offer, for a first look and for bug reports."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from specforge_core.hooks.manager import PluginRegistry

_PROBE_SECONDS = 60.0
"""For importing torch, on a disk that is cold and a machine that is busy."""

# In a process of its own: a torch that does not import must not take the doctor with it.
_TORCH_PROBE = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"version": torch.__version__, "threads": torch.get_num_threads(), "cuda": torch.version.cuda,
                  "devices": ["cpu", *gpus]}))
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Say what this machine and environment offer. Exit status 1 if something a run needs is missing."""
    findings = examine(ctx.obj)
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
    else:
        for name, value in findings.items():
            if name != "problems":
                typer.echo(f"{name:<10} {_plain(value)}")
        typer.echo("\n".join(f"problem: {problem}" for problem in findings["problems"]) or "nothing is missing")
    if findings["problems"]:
        raise typer.Exit(1)


def examine(registry: PluginRegistry) -> dict[str, Any]:
    """What was found, and under ``problems`` what a run would miss."""
    from specforge_core.hooks.discovery import core_version

    torch = _probe_torch()
    entries = registry.entries()
    problems = [f"torch: {torch['problem']}"] if "problem" in torch else []
    problems += [f"no {kind} is installed" for kind in ("strategy", "target-engine") if not registry.names(kind)]
    problems += [
        f"{entry.kind} {entry.name} of {entry.source} is {entry.status}: {entry.detail}"
        for entry in entries
        if entry.status not in ("ok", "disabled")
    ]
    return {
        "specforge": core_version(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.platform()}, {os.cpu_count()} CPUs",
        "torch": torch,
        "disk": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB free in {Path.cwd()}",
        "plugins": dict(Counter(entry.status for entry in entries)),
        "problems": problems,
    }


def _probe_torch() -> dict[str, Any]:
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-c", _TORCH_PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"did not import within {_PROBE_SECONDS:g} s"}
    if child.returncode:
        return {"problem": (child.stderr.strip().splitlines() or ["did not import"])[-1]}
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)
