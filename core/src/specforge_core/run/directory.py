# SPDX-License-Identifier: Apache-2.0
"""Where everything of a run lies. No other module spells a file name of the run directory.

::

    config.yaml           the resolved run file: `specforge train RUN` starts from it
    provenance.json       parts, versions and machine of the run
    ledger.sqlite         every ref seen and the window it was dealt to
    metrics.jsonl         one line per optimizer step
    evaluations.jsonl     one line per evaluation
    logs/                 of supervised capture processes
    checkpoints/          to resume from
    features/             unless data.features says otherwise
      train/ eval/        each: prompts/ (token ids), store/ (tensors), refs/ (metadata)
    export/FORMAT/        to serve
    bench.json eval.json  what was measured
    report/               HTML page and pictures
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from specforge_core.config.run_config import RunConfig
from specforge_core.contracts import ConfigError, DataError, Split
from specforge_core.contracts.files import open_regular, replace_file

_LOCK_BYTES = 64  # of who holds a lock

Role = Literal["run", "train"]


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of one run. Nothing is created before it is written."""

    root: Path
    features: Path

    @classmethod
    def of(cls, config: RunConfig) -> RunDirectory:
        root = config.run.directory
        return cls(root, config.data.features or root / "features")

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.root / "provenance.json"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.sqlite"

    @property
    def logs(self) -> Path:
        """What the processes that `specforge run` supervises say."""
        return self.root / "logs"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.root / "evaluations.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def bench(self) -> Path:
        return self.root / "bench.json"

    @property
    def evaluation(self) -> Path:
        return self.root / "eval.json"

    def export(self, format: str) -> Path:
        return self.root / "export" / format

    def split(self, split: Split) -> Path:
        """Prompts, features and refs of one split."""
        return self.features / split

    def prompts(self, split: Split) -> Path:
        return self.split(split) / "prompts"

    @contextmanager
    def lock(self, role: Role) -> Iterator[None]:
        """Hold the run for one role, so that a second process cannot write the same files.

        :raises ConfigError: another process holds it, or the directory cannot be written.
        """
        with self._take_lock(role):
            yield

    def _take_lock(self, role: Role) -> IO[bytes]:
        with ExitStack() as opened:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                descriptor = open_regular(self.root / f".{role}.lock", os.O_RDWR | os.O_CREAT | os.O_APPEND)
                handle = opened.enter_context(open(descriptor, "a+b", buffering=0))
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                handle.truncate(0)
                handle.write(f"pid {os.getpid()}".encode())
            except BlockingIOError:
                handle.seek(0)
                holder = handle.read(_LOCK_BYTES).decode(errors="replace") or "unknown"
                what = "this run" if role == "run" else f"the {role} role of this run"
                raise ConfigError(
                    f"another process ({holder}) is running {what}",
                    where=str(self.root),
                    hint="wait for it, stop it, or choose another run.directory",
                ) from None
            except OSError as error:
                raise ConfigError(
                    f"nothing can be written here: {error.strerror}",
                    where=str(self.root),
                    hint="free space, correct the permissions, or choose another run.directory",
                ) from error
            opened.pop_all()
            return handle


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or what was there before.

    :raises DataError: it cannot be written; what was there is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
    except OSError as error:
        raise DataError(
            f"cannot be written: {error.strerror}", where=str(path), hint="free space or correct the permissions there"
        ) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def to_yaml(value: Mapping[str, Any]) -> str:
    """A run file's text."""
    return str(yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True))


def run_file_of(run: Path) -> Path:
    """The run file behind what a user calls a run: a YAML file, or a run directory that holds one.

    :raises DataError: neither.
    """
    if run.is_dir():
        if (run / "config.yaml").is_file():
            return run / "config.yaml"
        raise DataError(
            "this directory is no run: it holds no config.yaml",
            where=str(run),
            hint="name a run file, or the run.directory of a run that was started",
        )
    return run
