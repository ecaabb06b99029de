# SPDX-License-Identifier: Apache-2.0
"""Writes reference.md, beside this file, from core's own signatures and docstrings: run it after changing one.

A test compares the two, so the reference cannot drift. The code is parsed, not imported.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
CORE = HERE.parents[1] / "core" / "src" / "specforge_core"
REFERENCE = HERE / "reference.md"

HEAD = """\
# Reference

Written from the code by `python docs/authoring/write_reference.py`; do not edit.

What a plugin may import: `specforge_core.contracts`, `specforge_core.modeling`, `specforge_core.testing`, and from
`specforge_core` itself the names {public}.

| kind | entry-point group | hook | descriptor | section | contract | suite |
|---|---|---|---|---|---|---|
{kinds}
| observer | `specforge.observers` | the five observer hooks | | | | |
"""

KINDS = {
    "strategy": ("strategies", "Strategy"),
    "target engine": ("target_engines", "TargetEngine"),
    "feature store": ("feature_stores", "FeatureStore"),
    "ref channel": ("ref_channels", "RefChannel"),
}

SECTIONS: list[tuple[str, list[tuple[str, str]]]] = [
    ("Hooks", [("hooks/specs.py", "*functions")]),
    ("Descriptors", [("hooks/descriptors.py", "*classes")]),
    ("Sections of the run file", [("hooks/sections.py", "*classes")]),
    ("Records", [("contracts/records.py", "*classes"), ("contracts/metrics.py", "*classes")]),
    ("Strategies", [("contracts/strategy.py", "*classes")]),
    ("Decoding", [("contracts/decoding.py", "*classes")]),
    ("Target engines", [("contracts/target_engine.py", "*classes")]),
    ("Feature stores", [("contracts/feature_store.py", "*classes"), ("contracts/part_context.py", "*classes")]),
    ("Ref channels", [("contracts/ref_channel.py", "*classes"), ("contracts/leases.py", "*classes")]),
    ("Errors", [("contracts/errors.py", "*summaries")]),
]
SUITES = {
    "StrategySuite": ("testing/strategy_suite.py",),
    "TargetEngineSuite": ("testing/target_engine_suite.py",),
    "FeatureStoreSuite": ("testing/feature_store_suite.py", "testing/store_access_suite.py"),
    "RefChannelSuite": (
        "testing/ref_channel_suite.py",
        "testing/channel_under_test.py",
        "testing/ref_delivery_suite.py",
        "testing/channel_ending_suite.py",
        "testing/lease_desk_suite.py",
    ),
}
"""The modules that hold each suite's tests; the first is the one to subclass from, and shows how."""

Definition = ast.ClassDef | ast.FunctionDef


def render() -> str:
    """The whole page."""
    public = ast.literal_eval(_assigned(_parse("__init__.py"), "__all__"))
    parts = [HEAD.format(public=", ".join(f"`{name}`" for name in public), kinds="\n".join(_kind_rows()))]
    for title, sources in SECTIONS:
        parts.append(f"## {title}\n")
        for place, what in sources:
            parts += [_render(node, what) for node in _definitions(place, what)]
    parts.append("\n## Contract suites\n")
    parts += [_render_suite(name, places) for name, places in SUITES.items()]
    return "\n".join(parts)


def _kind_rows() -> Iterator[str]:
    for kind, (plural, contract) in KINDS.items():
        names = [f"specforge.{plural}", f"specforge_{plural}", f"{contract}Spec", f"{contract}Config", contract]
        yield f"| {kind} | " + " | ".join(f"`{name}`" for name in [*names, f"{contract}Suite"]) + " |"


def _parse(place: str) -> ast.Module:
    return ast.parse((CORE / place).read_text(encoding="utf-8"))


def _assigned(module: ast.Module, name: str) -> ast.expr:
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value
    raise KeyError(name)


def _definitions(place: str, what: str) -> Iterator[Definition]:
    wanted = ast.FunctionDef if what == "*functions" else ast.ClassDef
    return (node for node in _parse(place).body if isinstance(node, wanted) and not node.name.startswith("_"))


def _render(node: Definition, what: str) -> str:
    text = _prose(ast.get_docstring(node) or "")
    if what == "*summaries":
        return f"* `{node.name}`: {text.split(chr(10), 1)[0]}"
    if isinstance(node, ast.FunctionDef):
        return f"### `{_signature(node)}`\n\n{text}\n"
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    lines = [f"### `{node.name}{f'({bases})' if bases else ''}`\n\n{text}\n", *_members(node)]
    return "\n".join(line for line in lines if line)


def _members(node: ast.ClassDef) -> Iterator[str]:
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    if fields:
        shown = "\n".join(ast.unparse(item) for item in fields).replace("'", '"')  # as the formatter quotes
        yield f"```python\n{shown}\n```\n"
    for item in node.body:
        if not isinstance(item, ast.FunctionDef) or item.name.startswith("_"):
            continue
        marks = {ast.unparse(decorator).split(".")[-1] for decorator in item.decorator_list}
        notes = [word for word in ("property", "classmethod") if word in marks]
        notes += ["to be implemented"] if "abstractmethod" in marks else []
        note = f" *({', '.join(notes)})*" if notes else ""
        text = _prose(ast.get_docstring(item) or "").replace("\n", "\n  ")
        yield f"* `{_signature(item)}`{note}" + (f"\n\n  {text}\n" if text else "\n")


def _signature(node: ast.FunctionDef) -> str:
    node.args.args = [argument for argument in node.args.args if argument.arg not in ("self", "cls")]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"


def _prose(docstring: str) -> str:
    """A docstring as Markdown: its fields become a list, its roles plain code."""
    text = re.sub(r":\w+:`~?([^`]*?)`", lambda match: f"`{match[1].rpartition('.')[2]}`", inspect.cleandoc(docstring))
    text = re.sub(r"\n[ ]{4,}", " ", text)
    text = re.sub(r"^:param ([\w ]+): ", r"* `\1`: ", text, flags=re.MULTILINE)
    text = re.sub(r"^:raises ([\w ]+): ", r"* raises `\1`: ", text, flags=re.MULTILINE)
    text = re.sub(r"^:returns: ", r"* returns ", text, flags=re.MULTILINE)
    return text.replace("``", "`")


def _render_suite(name: str, places: tuple[str, ...]) -> str:
    module = _parse(places[0])
    example = inspect.cleandoc(ast.get_docstring(module) or "").partition("::\n\n")[2].split("\n\n")
    code = []
    for block in example:
        if not block.startswith("    "):
            break
        code.append(inspect.cleandoc("\n" + block) if not code else re.sub(r"^    ", "", block, flags=re.MULTILINE))
    suites = [node for place in places for node in _parse(place).body if isinstance(node, ast.ClassDef)]
    thorough = {test for suite in suites for test in _thorough(suite)}
    parts = [part for suite in suites for part in suite.body if isinstance(part, ast.FunctionDef)]
    listed = "\n".join(
        f"* {test.removeprefix('test_').replace('_', ' ')}{' (not in `plugins check`)' if test in thorough else ''}"
        for test in (part.name for part in parts)
        if test.startswith("test_")
    )
    return f"### `{name}`\n\n```python\n{(chr(10) * 2).join(code)}\n```\n\n{listed}\n"


def _thorough(suite: ast.ClassDef) -> set[str]:
    for item in suite.body:
        if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == "thorough":
            return {str(node.value) for node in ast.walk(item.value) if isinstance(node, ast.Constant)}
    return set()


if __name__ == "__main__":
    REFERENCE.write_text(render(), encoding="utf-8")
