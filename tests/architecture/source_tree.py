# SPDX-License-Identifier: Apache-2.0
"""The repository's source files as the architecture tests see them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "core" / "src" / "specforge_core"
_SKIPPED = {".venv", ".venvs", ".git", "__pycache__", "runs", "dist", "build", "node_modules"}


@dataclass(frozen=True)
class Module:
    """One Python file."""

    path: Path

    @property
    def place(self) -> str:
        """The path from the root of the repository."""
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.place)

    @property
    def parts(self) -> tuple[str, ...]:
        """The dotted name, from the distribution's import package on; of tests and the like the path."""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        parts = parts[parts.index("src") + 1 :] if "src" in parts else parts
        return parts[:-1] if parts[-1] == "__init__" else parts

    def imports(self) -> Iterator[tuple[str, int]]:
        """Names of the modules that running this file may import, and the line; ``TYPE_CHECKING`` blocks are free."""
        package = self.parts if self.path.name == "__init__.py" else self.parts[:-1]
        for node in _walk_runtime(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else ()
                base = ".".join((*above, *([node.module] if node.module else [])))
                yield base, node.lineno
                if base in ("specforge_core", ""):
                    yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def _walk_runtime(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            for other in child.orelse:
                yield from _walk_runtime(other)
        else:
            yield from _walk_runtime(child)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


@cache
def python_files(*places: str) -> list[Module]:
    """Every Python file below the named places of the repository, sorted."""
    found = (path for place in places for path in (ROOT / place).rglob("*.py"))
    return [Module(path) for path in sorted(found) if not _SKIPPED & set(path.relative_to(ROOT).parts)]


def shipped() -> list[Module]:
    """What the distributions ship."""
    return [module for module in python_files(".") if "src" in module.path.relative_to(ROOT).parts]


def core() -> list[Module]:
    return [module for module in shipped() if module.parts[0] == "specforge_core"]


def plugins() -> list[Module]:
    return [module for module in shipped() if module.parts[0] != "specforge_core"]


def text_files() -> Iterator[Path]:
    """Every text file that belongs to the repository."""
    kinds = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", ".jsonl", ".cfg", ".html", ".sh"}
    for path in sorted(ROOT.rglob("*")):
        readable = path.suffix in kinds or path.name in ("Makefile", "run", "LICENSE")
        if readable and path.is_file() and not _SKIPPED & set(path.relative_to(ROOT).parts):
            yield path
