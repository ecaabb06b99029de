# SPDX-License-Identifier: Apache-2.0
"""The pages for plugin authors: the reference is what the code says, and what pages show and link to exists."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
from pathlib import Path

import pytest
from source_tree import ROOT

DOCS = ROOT / "docs" / "authoring"
PAGES = sorted(DOCS.rglob("*.md"))
WRITER = runpy.run_path(str(DOCS / "write_reference.py"))


def name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def test_the_reference_is_what_the_code_says() -> None:
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert text == WRITER["render"](), "run python docs/authoring/write_reference.py"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "reference.md"], ids=name)
def test_shown_code_parses_and_imports_what_there_is(page: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "specforge_core":
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_every_kind_of_part_has_a_page() -> None:
    from specforge_core.hooks.kinds import KINDS

    assert {page.stem for page in (DOCS / "how-to").glob("*.md")} >= set(KINDS) - {"strategy"}  # that is the tutorial
