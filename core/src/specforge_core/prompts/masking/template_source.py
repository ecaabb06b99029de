# SPDX-License-Identifier: Apache-2.0
"""What a chat template's source says of what it reads: the names in it, and the texts that it looks for in others.

A template is not understood here. Its words tell which keys of a row it may use, and its quoted texts where a content
must not be marked inside (``marking``). Too many of either do no harm.
"""

from __future__ import annotations

import re
from functools import cached_property

_COMMENTS = re.compile(r"\{#.*?#\}", re.DOTALL)
_CODE = re.compile(r"\{[%{](.*?)[%}]\}", re.DOTALL)
_QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", re.DOTALL)
_WORD = re.compile(r"[A-Za-z_]\w*")
_LOOKED_FOR = re.compile(
    r"(?:split|startswith|endswith|replace|find|index|partition|strip|lstrip|rstrip|count|trim)\s*\(\s*$|(?:==|!=)\s*$"
)
_LOOKS_IN = re.compile(r"^\s*(?:not\s+)?in\b")
_SHORTEST = 3
"""Shorter texts (a bracket, a dash) stand in every content and mark nothing."""


class TemplateSource:
    """A chat template's source, outside its comments."""

    def __init__(self, template: str):
        self._code = [found.group(1) for found in _CODE.finditer(_COMMENTS.sub("", template))]

    @cached_property
    def names(self) -> frozenset[str]:
        """Every word of it: a key that is not among them is not read."""
        return frozenset(word for code in self._code for word in _WORD.findall(code))

    @cached_property
    def literals(self) -> re.Pattern[str] | None:
        """What it looks for in texts, markup above all; None if nothing."""
        found = {
            _unescape(text)
            for code in self._code
            for quoted in _QUOTED.finditer(code)
            for text in [quoted.group(1) or quoted.group(2) or ""]
            if _LOOKED_FOR.search(code[: quoted.start()]) or _LOOKS_IN.match(code[quoted.end() :])
        }
        found = {text.strip() for text in found if len(text.strip()) >= _SHORTEST and re.search(r"\W", text.strip())}
        return re.compile("|".join(re.escape(text) for text in sorted(found, key=len, reverse=True))) if found else None


def _unescape(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t").replace("\\'", "'").replace('\\"', '"').replace("\\\\", "\\")
