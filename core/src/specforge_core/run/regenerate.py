# SPDX-License-Identifier: Apache-2.0
"""Answers made by the target: who answers, who has which conversation, and where it all goes.

Any number of processes, on any machines that reach the output directory, share the work: conversations are leased in
batches over the same desk as capture's, so that what a dead process had goes to the others. What one made is in its
journal; the process that finds everything made writes ``rows.jsonl``, the manifest and the report, and tidies up.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from specforge_core.contracts import (
    AnswerSource,
    CaptureBatch,
    ChannelError,
    ConfigError,
    DataError,
    GenerationSettings,
    Lease,
    LeaseDesk,
    PartContext,
    Split,
    TargetEngine,
)
from specforge_core.contracts.files import read_json_object
from specforge_core.features.file_channel import FileChannel
from specforge_core.hooks.builtin import FileChannelConfig
from specforge_core.prompts.directory_lock import locked
from specforge_core.prompts.reading.sources import find_files
from specforge_core.prompts.regeneration.dialogue import Dialogue, count_endings
from specforge_core.prompts.regeneration.journal import ROWS_FILE, Journal, Journals
from specforge_core.prompts.regeneration.loop import RegenerationLoop
from specforge_core.prompts.set_origin import describe_sources
from specforge_core.run.assemble import Run
from specforge_core.run.directory import write_json
from specforge_core.run.regeneration_rows import RegenerationRows
from specforge_core.run.wires import process_name

_WORK = ".work"
_BATCH = 16
"""Conversations leased together: seconds of work, so that a death costs little and the desk's log stays short."""
_WAIT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Made:
    """What was made, all processes together.

    :param endings: conversations by how they ended (``dialogue.ENDINGS``).
    :param unusable: rows that are no conversation, or could not be read.
    """

    rows: Path
    conversations: int
    endings: Mapping[str, int]
    unusable: int
    answered_by: Mapping[str, str]


def regenerate(run: Run, split: Split, *, limit: int | None = None) -> Made:
    """Answer a split's prompts; what was made before, with the same settings, stays.

    :param limit: only the first so many rows.
    :raises ConfigError: the output holds answers that were made otherwise.
    :raises TargetError: nobody answers.
    """
    work = _Regeneration(run, split, limit)
    manifest = work.manifest()
    if manifest is None:
        try:
            work.make()
        except (ChannelError, OSError):
            if work.manifest() is None:  # otherwise another process finished meanwhile, and tidied up
                raise
        manifest = work.finish()
    return Made(
        rows=work.output / ROWS_FILE,
        conversations=manifest["conversations"],
        endings=manifest["endings"],
        unusable=manifest["unusable"],
        answered_by=manifest["answered_by"],
    )


class _Regeneration:
    def __init__(self, run: Run, split: Split, limit: int | None):
        self._run, self._split, self._limit = run, split, limit
        self._settings = run.plan.config.regenerate
        data = run.plan.config.data
        self._files = find_files(data.train if split == "train" else data.eval)
        base = self._settings.output or run.directory.root / "regenerated"
        self.output = base / split
        self.manifest_file = base / f"{split}.manifest.json"  # beside the rows, whose directory is a source
        self.journals = Journals(self.output / _WORK)
        self.rows = RegenerationRows(run.plan.config, self._files, tokenizer=run.prompts.tokenizer, limit=limit)

    @cached_property
    def _source(self) -> AnswerSource:
        if self._settings.servers:
            from specforge_core.prompts.regeneration.chat_servers import ChatServers

            return ChatServers(self._settings, key=_read_key(self._settings.api_key_file))
        engine: TargetEngine = self._run.engine
        return engine.answers(self.rows.tokenizer, batch_size=self._settings.batch_size)

    @cached_property
    def key(self) -> dict[str, Any]:
        """What decides the answers: the same key, the same answers where they are greedy."""
        data = self._run.plan.config.data
        excluded = {"output", "servers", "api_key_file", "concurrency", "timeout_seconds", "retries", "batch_size"}
        sources = describe_sources(self._files, self.output)
        return {
            "settings": self._settings.model_dump(mode="json", exclude=excluded),
            "template_arguments": data.template_arguments,
            "mapping": data.mapping,
            "date": data.date.isoformat(),
            "seed": self._run.plan.config.run.seed,
            "sources": [(entry["name"], entry["sha256"]) for entry in sources],
            "target": self._run.plan.info.name_or_path,
            "limit": self._limit,
        }

    def manifest(self) -> dict[str, Any] | None:
        """What was finished before with the same key; None if nothing was.

        :raises ConfigError: it was made otherwise.
        """
        key = json.loads(json.dumps(self.key))
        for path, finished in ((self.manifest_file, True), (self.output / _WORK / "key.json", False)):
            if not path.exists():
                continue
            found = _read_json(path)
            known = found.get("key") if finished else found
            if known != key:
                differing = [name for name in key if not isinstance(known, dict) or known.get(name) != key[name]]
                raise ConfigError(
                    f"holds answers that were made otherwise: {', '.join(differing)} differ",
                    where=str(self.output),
                    hint="name another regenerate.output, or delete the directory",
                )
            return found if finished else None
        return None

    def make(self) -> None:
        """This process's share, beside others'."""
        run = self._run
        if self._settings.thinking != "template":
            _ = self.rows.switch
        answered_by = self._source.describe()
        (self.output / _WORK).mkdir(parents=True, exist_ok=True)
        write_json(self.output / _WORK / "key.json", self.key)
        write_json(self.output / _WORK / "answered_by.json", answered_by)
        progress = run.progress("regenerate")
        name = process_name()
        channel = FileChannel(
            FileChannelConfig(name="file", path=self.output / _WORK / "leases"),
            PartContext(run_id=run.plan.run_id, directory=self.output / _WORK),
        )
        writer = channel.writer(name)
        desk = channel.leases()
        try:
            with Journal(self.output / _WORK, name) as journal:
                claims = _LeasedConversations(self, desk, name)
                claims.offer()
                progress.begin("answers", claims.total)
                progress.advance(len(self.journals.endings))
                RegenerationLoop(
                    source=self._source,
                    settings=self._generation_settings(),
                    claims=claims,
                    journal=journal,
                    ask=self.rows.request,
                    progress=progress,
                    stop=run.stop,
                ).run()
        finally:
            desk.close()
            writer.close()
            self._source.close()

    def finish(self) -> dict[str, Any]:
        """Everything is made: the journals become rows, whichever process comes first."""
        with locked(self.output, progress=self._run.progress("regenerate")):
            finished = self.manifest()
            if finished is not None:
                return finished
            self.journals.refresh()
            places, unusable = self.rows.scan()
            missing = [place for place in places if place not in self.journals.endings]
            if missing:
                raise DataError(
                    f"{len(missing)} conversations are missing", where=str(self.output), hint="run it again"
                )
            digest = self.journals.merge(self.output / ROWS_FILE)
            endings = list(self.journals.endings.values())
            work = self.output / _WORK
            manifest = {
                "key": json.loads(json.dumps(self.key)),
                "answered_by": _read_json(work / "answered_by.json"),
                "conversations": len(endings),
                "endings": count_endings(endings),
                "unusable": unusable,
                "rows_sha256": digest,
            }
            write_json(self.manifest_file, manifest)
            shutil.rmtree(work, ignore_errors=True)
            return manifest

    def _generation_settings(self) -> GenerationSettings:
        settings = self._settings
        return GenerationSettings(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            seed=self._run.plan.config.run.seed,
            max_tokens=settings.max_tokens,
        )


class _LeasedConversations:
    """Batches of rows over a desk of leases."""

    def __init__(self, work: _Regeneration, desk: LeaseDesk, holder: str):
        self._work, self._desk, self._holder = work, desk, holder
        self._leases: dict[frozenset[int], Lease] = {}
        self.total = 0

    def offer(self) -> None:
        """Offer what was not made."""
        places, _ = self._work.rows.scan()
        self.total = len(places)
        self._work.journals.refresh()
        missing = sorted({place // _BATCH for place in places if place not in self._work.journals.endings})
        self._desk.offer(
            [CaptureBatch(split="train", epoch=0, first=number * _BATCH, count=_BATCH) for number in missing]
        )

    def take(self, *, wait: bool) -> Sequence[tuple[int, Dialogue]] | None:
        lease = self._desk.take(self._holder, _WAIT_SECONDS if wait else 0.0)
        if lease is None:
            return None
        self._work.journals.refresh()
        made = self._work.journals.endings
        batch = [
            (place, dialogue)
            for place, dialogue in self._work.rows.dialogues(lease.batch.first, lease.batch.count)
            if place not in made
        ]
        if not batch:
            self._desk.finish(lease)
            return None
        self._leases[frozenset(place for place, _ in batch)] = lease
        return batch

    def finish(self, places: Sequence[int]) -> None:
        self._desk.finish(self._leases.pop(frozenset(places)))

    @property
    def exhausted(self) -> bool:
        return not self._desk.outstanding()


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, refuse=lambda reason: DataError(reason, where=str(path), hint="delete the directory"))


def _read_key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot be read", where=f"regenerate.api_key_file {path}", hint="check the file") from error
