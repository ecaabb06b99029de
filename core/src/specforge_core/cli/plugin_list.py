# SPDX-License-Identifier: Apache-2.0
"""The listing of installed plugins. Must start quickly: metadata and plain text, no parser, no table renderer."""

from __future__ import annotations

import json
from collections.abc import Sequence

from specforge_core.cli.text_table import format_table
from specforge_core.hooks.discovery import list_entries


def print_plugins(disabled: Sequence[str], *, as_json: bool) -> None:
    """Print kind, name, distribution, version, origin, requirement and status of each, and what is amiss."""
    entries = list_entries(disabled)
    if as_json:
        print(json.dumps([entry.as_json() for entry in entries], indent=2))
        return
    header = ("KIND", "NAME", "DISTRIBUTION", "VERSION", "ORIGIN", "NEEDS CORE", "STATUS")
    rows = [(e.kind, e.name, e.distribution, e.version, e.origin, e.requires or "-", e.status) for e in entries]
    print(format_table(header, rows))
    for entry in entries:
        if entry.detail:
            print(f"{entry.kind} {entry.name} of {entry.source}: {entry.detail}")
    for kind in ("strategy", "target-engine"):
        if not any(entry.kind == kind for entry in entries):
            print(f"no {kind} is installed; a run needs one")
