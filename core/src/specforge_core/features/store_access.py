# SPDX-License-Identifier: Apache-2.0
"""Who may attach to a directory of features: whoever knows the token with which it was first used.

The directory keeps a nonce and an HMAC of it, never the token. This keeps the unprepared and the misconfigured out;
it does not replace file permissions: who can write into the directory can remove the proof.
"""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path

from specforge_core.contracts import AccessDenied, access_proof
from specforge_core.contracts.files import make_directory, open_regular, read_bytes, sync_directory

MARKER = ".access"
_MAX_MARKER_BYTES = 1 << 12
"""A nonce and a digest have some hundred characters; what is longer is nobody's proof."""


def claim_or_attach(directory: Path, *, token: str | None, holds_samples: bool) -> None:
    """Attach to ``directory``; the first to come with a token, before there are samples, claims it for the token.

    :param holds_samples: whether features are there already, which nobody can claim afterwards.
    :raises AccessDenied: the token is missing or another one, or what is there was put without any.
    :raises OSError: the directory cannot be read, or not be written by who claims it.
    """
    kept = _read(directory)
    if kept is None and token is None:
        return
    if kept is None and token is not None:
        if holds_samples:
            raise AccessDenied(
                "the features there were put without a token, so there is no telling by whom",
                where=str(directory),
                hint="go on without SPECFORGE_TOKEN, or remove the feature directory and capture again",
            )
        kept = _claim(directory, token)
    nonce, _, proof = (kept or "").partition(":")
    if token is None:
        raise AccessDenied(
            "these features are guarded by a token, and none was given", where=str(directory), hint=_SAME_TOKEN
        )
    if not hmac.compare_digest(proof.encode(), access_proof(token, purpose=_purpose(nonce)).encode()):
        raise AccessDenied("these features are guarded by another token", where=str(directory), hint=_SAME_TOKEN)


def _read(directory: Path) -> str | None:
    try:
        return read_bytes(directory / MARKER, limit=_MAX_MARKER_BYTES).decode("ascii", errors="replace").strip()
    except FileNotFoundError:
        return None


def _claim(directory: Path, token: str) -> str | None:
    """Keep the proof of ``token``, unless another process was quicker; what is kept then."""
    make_directory(directory)
    nonce = secrets.token_hex(16)
    aside = directory / f"{MARKER}.{secrets.token_hex(16)}"  # a name that nobody can have planted
    try:
        with open(open_regular(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w", encoding="ascii") as file:
            file.write(f"{nonce}:{access_proof(token, purpose=_purpose(nonce))}\n")
            file.flush()
            os.fsync(file.fileno())
        # of several at once one succeeds, and its content is whole
        os.link(aside, directory / MARKER, follow_symlinks=False)
        sync_directory(directory)
    except FileExistsError:
        pass
    finally:
        aside.unlink(missing_ok=True)
    return _read(directory)


def _purpose(nonce: str) -> str:
    return f"file store {nonce}"


_SAME_TOKEN = "give every process of the run the same SPECFORGE_TOKEN, or token file"
