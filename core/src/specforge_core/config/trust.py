# SPDX-License-Identifier: Apache-2.0
"""What a run directory may not decide for the user who is handed it: asked for again on the command line.

Files that are read as data and stay on this machine are harmless. Whatever runs code, connects to somebody, writes
outside the run directory or uses a secret widens the trust in a run, and a section says which of its keys do
(``widens_trust``). A run file that a user names is the user's word.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from specforge_core.config.load import LoadedConfig
from specforge_core.config.run_config import HubSource, RunConfig
from specforge_core.contracts.redaction import hide_secrets
from specforge_core.hooks.sections import PluginSection

_log = logging.getLogger(__name__)

_NOT_OURS = (
    "the run directory was not made by you on this machine, or was moved or edited since (or no key could be kept in "
    "$XDG_STATE_HOME/specforge when it was made): what it asks for above is yours to decide, each time"
)


def find_unconfirmed(loaded: LoadedConfig, sections: Mapping[str, PluginSection]) -> list[str]:
    """What a received run asks for and the command line does not; what it does say is repeated as a warning.

    :param sections: the plugins' sections, by their keys in the run file.
    """
    if not loaded.received:
        return []
    asked = _core_asks(loaded.config)
    for section, part in sections.items():
        asked |= {(section, key): what for key, what in part.widens_trust().items()}
    unconfirmed = []
    for keys, what in asked.items():
        dotted = ".".join(keys)
        if any(keys[:length] in loaded.overridden for length in (1, 2)):
            _log.warning("%s: as the command line says (%s), this run may %s", loaded.path, dotted, what)
            continue
        unconfirmed.append(
            f"{loaded.locate(keys)}: this run asks to {what}; "
            f"say {dotted}={_shown(loaded.given(keys))} on the command line if you trust it"
        )
    return [*unconfirmed, _NOT_OURS] if unconfirmed else []


def _core_asks(config: RunConfig) -> dict[tuple[str, str], str]:
    asked = {}
    if config.run.token_file is not None:
        asked["run", "token_file"] = f"use the secret in {config.run.token_file}"
    for key, sources in (("train", config.data.train), ("eval", config.data.eval)):
        hubs = [source.hub for source in sources if isinstance(source, HubSource)]
        if hubs:
            asked["data", key] = f"connect to the hub and download {', '.join(hubs)}"
    made = config.regenerate
    if made.servers:
        asked["regenerate", "servers"] = f"connect to {', '.join(made.servers)} and send them its prompts"
    if made.api_key_file is not None:
        asked["regenerate", "api_key_file"] = f"use the secret in {made.api_key_file}"
    if made.output is not None:
        asked["regenerate", "output"] = f"keep answers in {made.output}"
    if config.data.features is not None:
        asked["data", "features"] = f"keep its features in {config.data.features}"
    return asked


def _shown(value: object) -> str:
    return hide_secrets(value if isinstance(value, str) else json.dumps(value, default=str))
