# SPDX-License-Identifier: Apache-2.0
"""From a run file and overrides to a :class:`RunConfig`, with errors that name file, key and line.

Relative paths in a run file are relative to the current working directory, as on a command line, not to the file:
the resolved copy in the run directory must mean the same as the original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specforge_core.config.document import Keys, read_document
from specforge_core.config.overrides import apply_override, parse_override
from specforge_core.config.run_config import RunConfig
from specforge_core.config.validation import validate_section
from specforge_core.contracts import ConfigError
from specforge_core.contracts.redaction import SAID_CHARACTERS, hide_secrets


@dataclass(frozen=True, slots=True)
class RunSource:
    """The run directory that a run file lies in. The run writes there, wherever the file says it does.

    :param content: of the run file, as it was when ``received`` was found out.
    :param received: somebody else may have written it.
    """

    directory: Path
    content: bytes
    received: bool


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A run file that core understands; the plugins' sections are not checked yet.

    :param lines: line number of each key in the file, 1 for the first line.
    :param overridden: the override's text without secrets, by the keys that it set.
    :param received: it may be somebody else's word: it lies in a run directory that this user did not make here.
    """

    config: RunConfig
    path: Path
    lines: Mapping[tuple[str, ...], int]
    overridden: Mapping[tuple[str, ...], str]
    received: bool = False

    def given(self, keys: tuple[str, str]) -> Any:
        """The value of a section's key, as the run file has it."""
        section = self.config.model_dump(mode="json")[keys[0]]
        return section.get(keys[1]) if isinstance(section, dict) else None

    def locate(self, keys: Keys) -> str:
        """``run.yaml: training.epochs (line 12)``, or the override that set it."""
        return _locate(self.path, self.lines, self.overridden, keys)


def load_run_config(
    path: Path | str, overrides: Sequence[str] = (), *, source: RunSource | None = None
) -> LoadedConfig:
    """Read a run file and apply ``a.b=c`` overrides, in order.

    :param source: where the file is a run directory's; None: the user named the run file itself.
    :raises ConfigError: everything wrong with it that core can tell, at once.
    """
    path = Path(path)
    document = read_document(path, source.content if source is not None else None)
    values: dict[str, Any] = document.values
    if source is not None and isinstance(values.get("run"), dict):
        values["run"]["directory"] = str(source.directory)
    overridden: dict[tuple[str, ...], str] = {}
    for text in overrides:
        override = parse_override(text)
        apply_override(values, override)
        overridden = {k: v for k, v in overridden.items() if k[: len(override.keys)] != override.keys}
        overridden[override.keys] = override.text
    config, problems = validate_section(
        RunConfig, values, locate=lambda keys: _locate(path, document.lines, overridden, keys)
    )
    if config is None:
        raise _config_error(path, problems)
    received = source is not None and source.received
    return LoadedConfig(config, path, document.lines, overridden, received)


def _config_error(path: Path, problems: Sequence[tuple[str, str]]) -> ConfigError:
    if len(problems) == 1:
        where, message = problems[0]
        return ConfigError(message, where=where)
    listed = "\n".join(f"  - {where.removeprefix(f'{path}: ')}: {message}" for where, message in problems)
    return ConfigError(f"{len(problems)} problems:\n{listed}", where=str(path))


def _locate(
    path: Path, lines: Mapping[tuple[str, ...], int], overridden: Mapping[tuple[str, ...], str], keys: Keys
) -> str:
    texts = tuple(str(key) for key in keys)
    dotted = hide_secrets(".".join(texts))[:SAID_CHARACTERS]
    for length in range(len(texts), 0, -1):
        if texts[:length] in overridden:
            return f"override {overridden[texts[:length]]!r}"
        if texts[:length] in lines:
            return f"{path}: {dotted} (line {lines[texts[:length]]})"
    inside = [text for set_keys, text in overridden.items() if texts and set_keys[: len(texts)] == texts]
    if inside:
        return f"override {inside[0]!r}"
    return f"{path}: {dotted}" if dotted else str(path)
