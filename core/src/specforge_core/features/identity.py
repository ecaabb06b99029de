# SPDX-License-Identifier: Apache-2.0
"""Names of samples and writers: which of them may become file names."""

from __future__ import annotations

_MAX_NAME_BYTES = 200


def file_name_problem(name: str) -> str | None:
    """Why ``name`` cannot be part of a file name, or None where it can."""
    if not name:
        return "it is empty"
    if name.startswith("."):
        return "it begins with a dot"
    if any(character in "/\\" or not character.isprintable() for character in name):
        return "it holds a separator or an unprintable character"
    if len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES:
        return f"it is longer than {_MAX_NAME_BYTES} bytes"
    return None
