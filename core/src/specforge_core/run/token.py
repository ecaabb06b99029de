# SPDX-License-Identifier: Apache-2.0
"""The run's shared secret: from a file that the run file names, or from the environment."""

from __future__ import annotations

import os

from specforge_core.config.run_config import RunSection
from specforge_core.contracts import ConfigError

VARIABLE = "SPECFORGE_TOKEN"
_FEWEST_CHARACTERS = 16


def read_token(section: RunSection) -> str | None:
    """The token, or None where none is configured.

    :raises ConfigError: a file that cannot be read, or a token too short to be a secret.
    """
    if section.token_file is not None:
        where = str(section.token_file)
        try:
            token = section.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"run.token_file cannot be read: {error}", where=where, hint="make one: openssl rand -hex 32 > FILE"
            ) from error
    elif VARIABLE in os.environ:
        token, where = os.environ[VARIABLE].strip(), f"environment, {VARIABLE}"
    else:
        return None
    if len(token) < _FEWEST_CHARACTERS:
        raise ConfigError(
            f"the token has {len(token)} characters, {_FEWEST_CHARACTERS} are the least",
            where=where,
            hint="make one: openssl rand -hex 32",
        )
    return token
