# SPDX-License-Identifier: Apache-2.0
"""A prompt for people: on a terminal, in a pipe, or as a page, with what is trained marked. Text is only ever text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from rich.console import Console
from rich.text import Text

from specforge_core.contracts.redaction import visible

_OPEN, _CLOSE = "⟦", "⟧"
_TRAINED_STYLE = "bold green"
_PAGE_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;color:#0f172a;background:#f8fafc;margin:0 auto;max-width:960px;"
    "padding:32px}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#fff;border:1px solid #e2e8f0;border-radius:8px;"
    "padding:16px;font-size:14px}mark{background:#bbf7d0;color:inherit}h1{font-size:20px}p{color:#64748b}"
)


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is trained, or that is not."""

    text: str
    trained: bool


def print_prompt(title: str, pieces: Sequence[Piece], console: Console) -> None:
    """In colour where the console has any; else what is trained stands in brackets."""
    console.print(visible(title), markup=False, highlight=False, soft_wrap=True)
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    if coloured:
        shown = Text()
        for piece in pieces:
            shown.append(visible(piece.text), style=_TRAINED_STYLE if piece.trained else "")
        console.print(shown, soft_wrap=True)
    else:
        console.print(bracket(pieces), markup=False, highlight=False, soft_wrap=True)


def bracket(pieces: Sequence[Piece]) -> str:
    """Plain text; brackets that the prompt itself holds are spelt out."""
    written = []
    for piece in pieces:
        text = visible(piece.text)
        for sign in (_OPEN, _CLOSE):
            text = text.replace(sign, sign.encode("unicode_escape").decode())
        written.append(f"{_OPEN}{text}{_CLOSE}" if piece.trained else text)
    return "".join(written)


def render_prompt_page(title: str, pieces: Sequence[Piece]) -> str:
    """One HTML file that asks nothing of the network."""
    body = "".join(
        f"<mark>{escape(visible(piece.text))}</mark>" if piece.trained else escape(visible(piece.text))
        for piece in pieces
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(visible(title))}</title><style>{_PAGE_STYLE}</style></head>"
        f"<body><h1>{escape(visible(title))}</h1><p>What is marked is trained.</p><pre>{body}</pre></body></html>\n"
    )
