# SPDX-License-Identifier: Apache-2.0
"""Text that every machine has: the functions of the Python standard library, for the demo's target.

Each function is written in the compiler's normal form (``ast.unparse``), without comments and docstring, and becomes a
conversation: the user gives its beginning, the assistant the rest. Files are taken in sorted order; every tenth is held
out whole, and a function that also stands in a file trained on is not held out.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_CHARACTERS = 120
MAX_CHARACTERS = 4000
MAX_FILE_BYTES = 400_000
HELD_OUT_EVERY = 10

# Installed code is no standard library; the rest is missing from some systems' Python packages.
_SKIPPED = frozenset(
    (
        *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "distutils"),
        *("ensurepip", "turtledemo", "pydoc_data", "lib-dynload", "tkinter", "__pycache__"),
    )
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One function: its beginning as the user's turn, the rest as the assistant's."""

    user: str
    assistant: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Exchanges to train on and held-out ones; the fingerprint changes with any of them."""

    train: tuple[Exchange, ...]
    held_out: tuple[Exchange, ...]
    fingerprint: str


def read_corpus(*, max_files: int | None = None) -> Corpus:
    """Read the running interpreter's standard library.

    :param max_files: use only the first so many files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    relative = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    chosen = [path for path in relative if not _SKIPPED & set(path.parts)][:max_files]
    texts: dict[bool, dict[str, None]] = {False: {}, True: {}}
    for index, path in enumerate(chosen):
        held_out = index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        for text in _functions(root / path):
            texts[held_out][text] = None
    train = list(texts[False])
    held = [text for text in texts[True] if text not in texts[False]]
    fingerprint = hashlib.sha256("\0".join([*train, "", *held]).encode()).hexdigest()
    return Corpus(tuple(map(_as_exchange, train)), tuple(map(_as_exchange, held)), fingerprint)


def _functions(path: Path) -> Iterator[str]:
    if path.stat().st_size > MAX_FILE_BYTES:
        return
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # templates and files kept for another Python version
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        if not node.body:
            continue
        text = ast.unparse(node)
        if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS and text.count("\n") >= 2 and text.isascii():
            yield text


def _as_exchange(text: str) -> Exchange:
    """Give the head and the first third of the body."""
    lines = text.split("\n")
    given = max(2, len(lines) // 3)
    return Exchange("\n".join(lines[:given]), "\n".join(lines[given:]))
