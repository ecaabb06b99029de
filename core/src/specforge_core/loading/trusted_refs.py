# SPDX-License-Identifier: Apache-2.0
"""Refs that may be trained on, out of those that came: what nobody with the run's token signed is passed over.

A stranger who can write into a channel must neither have anything trained nor stop the run. So such refs are warned of,
with where they stand, and left out; the sample that one of them names still comes from those who may capture it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from specforge_core.contracts import AccessDenied, SampleRef

_log = logging.getLogger(__name__)


class TrustedRefs:
    """Lets through what ``check`` accepts.

    :param check: raises AccessDenied for a ref to pass over, and whatever else must end the run.
    """

    def __init__(self, check: Callable[[SampleRef], None]) -> None:
        self._check = check
        self._passed_over = 0
        self._last: AccessDenied | None = None

    def __call__(self, refs: Sequence[SampleRef]) -> list[SampleRef]:
        """The refs of ``refs`` that are trusted, in their order."""
        return [ref for ref in refs if self._is_trusted(ref)]

    @property
    def note(self) -> str:
        """What was passed over, for a message about what did not come; empty where nothing was."""
        return "" if self._last is None else f"{self._passed_over} refs were passed over, the last: {self._last}"

    def _is_trusted(self, ref: SampleRef) -> bool:
        try:
            self._check(ref)
        except AccessDenied as error:
            self._passed_over += 1
            self._last = error
            if self._passed_over & (self._passed_over - 1) == 0:  # the 1st, 2nd, 4th, 8th: many must not fill the log
                _log.warning("a ref is passed over (%d so far): %s", self._passed_over, error)
            return False
        return True
