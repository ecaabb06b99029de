# SPDX-License-Identifier: Apache-2.0
"""JSON schema of the run file, installed plugins' sections included: for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any

from specforge_core.config.run_config import RunConfig
from specforge_core.contracts import PluginError
from specforge_core.hooks.kinds import KINDS, PARTS, Kind
from specforge_core.hooks.manager import PluginRegistry


def run_schema(registry: PluginRegistry) -> tuple[dict[str, Any], list[PluginError]]:
    """The schema, and the plugins that had to be left out of it because they do not load."""
    schema = RunConfig.model_json_schema()
    definitions: dict[str, Any] = schema.setdefault("$defs", {})
    failures: list[PluginError] = []
    for kind in PARTS:
        key = KINDS[kind].section
        choices: list[dict[str, Any]] = []
        for name in registry.names(kind):
            try:
                choices.append(_part_schema(registry, kind, name, definitions))
            except PluginError as error:
                failures.append(error)
        section: dict[str, Any] = schema["properties"][key]
        if not choices:
            continue
        described: dict[str, Any] = {item: section[item] for item in ("description", "default") if item in section}
        optional = [{"type": "null"}] if "default" in section else []
        schema["properties"][key] = {**described, "anyOf": choices + optional}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, failures


def _part_schema(registry: PluginRegistry, kind: Kind, name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    prefix = f"{kind}.{name}"
    spec = registry.part(kind, name)
    schema = spec.config.model_json_schema(ref_template=f"#/$defs/{prefix}.{{model}}")
    for model, definition in schema.pop("$defs", {}).items():
        definitions[f"{prefix}.{model}"] = definition
    schema["properties"]["name"] = {"const": name, "description": spec.summary}
    schema["required"] = sorted({"name", *schema.get("required", [])})
    definitions[prefix] = schema
    return {"$ref": f"#/$defs/{prefix}"}
