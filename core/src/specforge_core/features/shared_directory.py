# SPDX-License-Identifier: Apache-2.0
"""The directory of a store or channel, which others may write into."""

from __future__ import annotations

import os
from pathlib import Path

from specforge_core.contracts.files import refuse_link, warn_where_anybody_writes


class SharedDirectory:
    """
    :param configured: what the user chose; it may be a link, or be reached through links, and is then where they led
        when the run began.
    :param default: where it is otherwise, which is never a link: nobody chose where that one leads.
    :param holds: in words, for the user.
    """

    def __init__(self, configured: Path | None, *, default: Path, holds: str) -> None:
        self._holds = holds
        # os.path.realpath and not Path.resolve, which raises where links lead in a circle; opening it says so better
        self.path = Path(os.path.realpath(configured or default.parent)) / ("" if configured else default.name)

    def check(self) -> None:
        """Warn where every user of the machine may write into it.

        :raises OSError: it is a link, and nobody chose it.
        """
        refuse_link(self.path)
        warn_where_anybody_writes(self.path, self._holds)
