# SPDX-License-Identifier: Apache-2.0
"""core/README.md is the architecture document: its annotated tree lists exactly the modules on disk."""

from __future__ import annotations

import re

from source_tree import CORE, ROOT

README = ROOT / "core" / "README.md"
_ENTRY = re.compile(r"^([\s│├└─|`+-]*)([\w.-]+/?)")


def parse_tree(block: str) -> set[str]:
    """Module paths, from indentation and names; the first line is the root. Folders end with a slash."""
    modules, above = set(), []
    lines = [line for line in block.splitlines() if _ENTRY.match(line)]
    for line in lines[1:]:
        indent, name = _ENTRY.match(line).groups()
        while above and above[-1][0] >= len(indent):
            above.pop()
        if name.endswith("/"):
            above.append((len(indent), name))
        elif name.endswith(".py"):
            modules.add("".join(folder for _, folder in above) + name)
    return modules


def tree_block() -> str:
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    trees = [block for block in blocks if block.lstrip().startswith(("specforge_core/", "core/", "src/"))]
    assert len(trees) == 1, "core/README.md has one fenced block that begins with specforge_core/"
    return trees[0]


def on_disk() -> set[str]:
    return {path.relative_to(CORE).as_posix() for path in CORE.rglob("*.py") if path.name != "__init__.py"}


def test_the_readme_lists_exactly_the_modules_on_disk() -> None:
    listed = {name for name in parse_tree(tree_block()) if not name.endswith("__init__.py")}
    assert {"missing": sorted(on_disk() - listed), "gone": sorted(listed - on_disk())} == {"missing": [], "gone": []}


def test_every_line_of_the_tree_says_what_it_is() -> None:
    bare = [line for line in tree_block().splitlines() if line.strip().endswith(".py")]
    assert bare == []


def test_the_tree_is_parsed_as_meant() -> None:
    block = (
        "specforge_core/\n  a/   first\n    x.py  one\n    b/\n      y.py  two\n  c/\n    z.py  three\n  top.py  four\n"
    )
    assert parse_tree(block) == {"a/x.py", "a/b/y.py", "c/z.py", "top.py"}


def test_unit_tests_stand_where_their_subject_does() -> None:
    """``tests/unit`` has core's folders, and one for each distribution beside it."""
    unit = ROOT / "tests" / "unit"
    folders = {path.relative_to(CORE).as_posix() for path in CORE.rglob("*") if path.is_dir()}
    others = {path.name.removeprefix("specforge_") for path in ROOT.glob("**/src/specforge_*") if path != CORE}
    found = {path.parent.relative_to(unit).as_posix() for path in unit.rglob("test_*.py")}
    assert found <= folders | others
