# SPDX-License-Identifier: Apache-2.0
"""Who may use a run's objects: with a token, whoever knows it; without one, whoever has none.

The service itself knows no users. Two things stand in: the objects of a run with a token have names that cannot be
guessed without it (``layout``), and a proof object, at a name that everybody can find, makes attaching without the
token, or with another one, an error instead of an empty store. A run without a token leaves one that says so, lest a
process that was given a token by mistake claims the run and shuts the others out.
"""

from __future__ import annotations

import hmac

from specforge_core.contracts import AccessDenied, access_proof

from specforge_mooncake_store.connection import Connection, StoreHasNoRoom

_NONE = "no token"
_SAME_TOKEN = "give every process of the run the same SPECFORGE_TOKEN, or token file"


class AccessGuard:
    """Checks, and keeps, one run's proof.

    :param key: where the proof is kept.
    """

    def __init__(self, connection: Connection, *, key: str, run_id: str, token: str | None) -> None:
        self._connection = connection
        self._key = key
        self._run_id = run_id
        self._given = token is not None
        self._proof = _NONE if token is None else access_proof(token, purpose=f"mooncake store {run_id}")
        self._kept = False

    def attach(self) -> None:
        """Check the proof that is kept; the first to come leaves it.

        :raises AccessDenied: the token is missing, or another one, or the run has none.
        """
        found = self._connection.read_small(self._key)
        if found is None:
            found = self._leave()
        if found is None:
            return
        if self._given and found == _NONE.encode():
            raise AccessDenied("this run was begun without a token, and one was given", **self._told())
        if not self._given and found != _NONE.encode():
            raise AccessDenied("this run's features are guarded by a token, and none was given", **self._told())
        if not hmac.compare_digest(found, self._proof.encode()):
            raise AccessDenied("this run's features are guarded by another token", **self._told())
        self._kept = True

    def keep(self) -> None:
        """Leave the proof again where it may have gone with the process or master that held it."""
        if not self._kept:
            self.attach()

    def doubt(self) -> None:
        """Something was lost; the proof may have been too."""
        self._kept = False

    def _leave(self) -> bytes | None:
        try:
            self._connection.put_small(self._key, self._proof.encode())
        except StoreHasNoRoom:
            return None  # nobody has brought memory yet; the first put leaves it
        return self._connection.read_small(self._key)  # another process may have been quicker

    def _told(self) -> dict[str, str]:
        return {"where": f"store mooncake, run {self._run_id}", "hint": _SAME_TOKEN}
