# SPDX-License-Identifier: Apache-2.0
"""Regenerating a split of a run's data: what is set up for the loop, shared with other processes, and put together.

Work lies in ``.NAME.partial`` beside the output until every conversation is recorded; then one process puts the set
together, and the directory with the work goes.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specforge_core.config.run_config import RunConfig
from specforge_core.contracts import (
    AnswerSource,
    CaptureBatch,
    ChannelError,
    ChatTokenizer,
    DataError,
    GenerationSettings,
    Progress,
    Split,
)
from specforge_core.contracts.files import make_directory, read_json_object, refuse_link
from specforge_core.features.file_leases import FileLeases
from specforge_core.prompts.directory_lock import locked
from specforge_core.prompts.reading.sources import SourceFile, find_files
from specforge_core.prompts.regeneration.asked_prompts import AskedPrompts, batches_of, write_asked
from specforge_core.prompts.regeneration.asking import Asker, AskingRules
from specforge_core.prompts.regeneration.chat_servers import ChatServers, ServerSettings
from specforge_core.prompts.regeneration.loop import Regeneration, RegenerationParts
from specforge_core.prompts.regeneration.regenerated_set import (
    find_changes,
    fingerprint_of,
    read_manifest,
    read_report,
    write_set,
)
from specforge_core.prompts.set_origin import describe_sources
from specforge_core.run.answer_log import ANSWERS_SUFFIX, AnswerFile, RecordedAnswers
from specforge_core.run.assemble import Run
from specforge_core.run.directory import write_json
from specforge_core.run.wires import process_name

_WORK_FILE, _SET = "work.json", "set"
_SERVED_LEASE = 16
"""Conversations of a lease where servers answer: so many that leases cost little, so few that all share the rest."""
_TIMEOUT_SECONDS = 60.0
"""A process silent for longer is taken for dead where its lock is not seen."""


@dataclass(frozen=True, slots=True)
class Regenerated:
    """A set that is there, and what was made for it."""

    directory: Path
    report: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be done, and where it lies.

    :param most: only the first so many conversations.
    """

    run: Run
    split: Split
    most: int | None

    @property
    def config(self) -> RunConfig:
        return self.run.plan.config

    @property
    def output(self) -> Path:
        return (self.config.regenerate.output or self.run.directory.root / "regenerated") / self.split

    @property
    def work(self) -> Path:
        return self.output.parent / f".{self.output.name}.partial"


def regenerate(run: Run, split: Split, *, limit: int | None = None) -> Regenerated:
    """Have the target answer the conversations of a split, with whoever else does; or find that it has.

    :param limit: only the first so many conversations.
    :raises SpecForgeError: what went wrong. What was recorded stays, and the same call goes on from there.
    """
    job, progress = _Job(run, split, limit), run.progress("regenerate")
    config = job.config
    files = find_files(config.data.train if split == "train" else config.data.eval)
    tokenizer = run.prompts.tokenizer()
    with closing(_open_source(job, tokenizer)) as source:
        description = _describe(job, files, tokenizer, source)
        asker = Asker(tokenizer, _asking_rules(job, in_tokens=not config.regenerate.servers))
        with locked(job.output, progress=progress):
            if _is_done(job, description):
                return _finished(job)
            _set_up(job, files, description)
        try:
            _work(job, source, asker, description=description, progress=progress)
        except (ChannelError, OSError):
            if read_manifest(job.output) is None:  # another process may have put it together, and removed the work
                raise
        with locked(job.output, progress=progress):
            if not _is_done(job, description):
                _put_together(job, description)
    return _finished(job)


def _open_source(job: _Job, tokenizer: ChatTokenizer) -> AnswerSource:
    section = job.config.regenerate
    if section.servers:
        settings = ServerSettings(
            addresses=tuple(section.servers),
            model=section.model,
            api_key_file=section.api_key_file,
            concurrency=section.concurrency,
            timeout_seconds=section.timeout_seconds,
            retries=section.retries,
        )
        return ChatServers(settings, stop=job.run.stop)
    return job.run.engine.answers(tokenizer, batch_size=section.batch_size)


def _sampling(job: _Job) -> GenerationSettings:
    section = job.config.regenerate
    return GenerationSettings(
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        seed=job.config.run.seed,
        max_tokens=section.max_tokens,
    )


def _asking_rules(job: _Job, *, in_tokens: bool) -> AskingRules:
    config = job.config
    return AskingRules(
        seed=config.run.seed,
        thinking=config.regenerate.thinking,
        arguments=config.data.template_arguments,
        date=config.data.date,
        in_tokens=in_tokens,
    )


def _describe(job: _Job, files: list[SourceFile], tokenizer: ChatTokenizer, source: AnswerSource) -> dict[str, Any]:
    """All that decides what is made, and how the work is cut: two processes that share it have the same."""
    config, section = job.config, job.config.regenerate
    sources = [[entry["name"], entry["sha256"]] for entry in describe_sources(files, job.output)]
    data = config.data.model_dump(mode="json", include={"mapping", "template_arguments", "date", "on_bad_row"})
    made = section.model_dump(mode="json", include={"turns", "temperature", "top_p", "top_k", "max_tokens", "thinking"})
    return {
        "sources": sources,
        "most": job.most,
        **data,
        **made,
        "seed": config.run.seed,
        "tokenizer": tokenizer.fingerprint,
        "engine": "servers" if section.servers else job.run.plan.target_engine.name,
        "model": source.describe()["model"],
        "lease": section.batch_size if source.answers_together else _SERVED_LEASE,
    }


def _is_done(job: _Job, description: Mapping[str, Any]) -> bool:
    """Whether the set is there.

    :raises DataError: one is there that was made otherwise.
    """
    manifest = read_manifest(job.output)
    if manifest is None:
        if job.output.exists() and any(job.output.iterdir()):
            raise DataError("holds other files", where=str(job.output), hint="choose another regenerate.output")
        return False
    if manifest["fingerprint"] != fingerprint_of(description):
        _refuse_other(job.output, "answers that were made", manifest["settings"], description)
    shutil.rmtree(job.work, ignore_errors=True)
    return True


def _set_up(job: _Job, files: list[SourceFile], description: Mapping[str, Any]) -> None:
    """Write down what is to be answered, unless that was done; call with the lock.

    :raises DataError: answers of other settings are being made there.
    """
    path = job.work / _WORK_FILE
    if not path.exists():
        refuse_link(job.work)
        shutil.rmtree(job.work, ignore_errors=True)
        make_directory(job.work)
        try:
            skipped = write_asked(files, job.work, settings=job.config.data, most=job.most)
        except BaseException:
            shutil.rmtree(job.work, ignore_errors=True)
            raise
        write_json(path, {"description": dict(description), "skipped": dict(skipped)})
        return
    recorded = _read_work(job)["description"]
    if recorded != description:
        _refuse_other(job.work, "unfinished answers", recorded, description)


def _read_work(job: _Job) -> dict[str, Any]:
    path = job.work / _WORK_FILE

    def refuse(reason: str) -> DataError:
        return DataError(f"cannot be read: {reason}", where=str(path), hint="delete the directory")

    return read_json_object(path, refuse=refuse)


def _refuse_other(place: Path, what: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    raise DataError(
        f"holds {what} with other settings: {'; '.join(find_changes(there, here)) or 'the manifest was altered'}",
        where=str(place),
        hint="choose another regenerate.output, or delete the directory",
    )


def _work(
    job: _Job,
    source: AnswerSource,
    asker: Asker,
    *,
    description: Mapping[str, Any],
    progress: Progress,
) -> None:
    with ExitStack() as opened:
        asked = opened.enter_context(closing(AskedPrompts(job.work)))
        name, who = process_name(), source.describe()
        log = AnswerFile(job.work, name, count=len(asked), answered_by=who, timeout_seconds=_TIMEOUT_SECONDS)
        opened.callback(log.close)
        desk = FileLeases(job.work, timeout_seconds=_TIMEOUT_SECONDS, owner_suffix=ANSWERS_SUFFIX)
        opened.callback(desk.close)
        fingerprint = fingerprint_of(description)
        log.all.refresh()
        batches = [
            CaptureBatch(split=job.split, epoch=0, first=first, count=count, fingerprint=fingerprint)
            for first, count in batches_of(len(asked), description["lease"])
            if len(log.all.known(first, count)) < count
        ]
        desk.offer(batches)
        progress.begin("regenerating", len(asked))
        progress.advance(len(asked) - sum(batch.count for batch in batches))  # the rest as its leases are taken
        parts = RegenerationParts(
            source=source,
            asker=asker,
            asked=asked,
            desk=desk,
            holder=name,
            log=log,
            settings=_sampling(job),
            turns=job.config.regenerate.turns,
        )
        Regeneration(parts, progress=progress, stop=job.run.stop).run()


def _put_together(job: _Job, description: Mapping[str, Any]) -> None:
    """Make the set of what was recorded, and visible; call with the lock."""
    with closing(AskedPrompts(job.work)) as asked:
        recorded = RecordedAnswers(job.work, len(asked))
    with closing(recorded):
        if missing := recorded.missing():
            raise DataError(
                f"{missing} conversations are not recorded", where=str(job.work), hint="run the same command again"
            )
        shutil.rmtree(job.work / _SET, ignore_errors=True)
        write_set(
            job.work / _SET,
            recorded.conversations(),
            description=description,
            answered_by=recorded.answered_by(),
            skipped=Counter(_read_work(job)["skipped"]),
        )
    if job.output.exists():
        job.output.rmdir()  # empty: looked at before
    (job.work / _SET).rename(job.output)
    shutil.rmtree(job.work, ignore_errors=True)


def _finished(job: _Job) -> Regenerated:
    return Regenerated(job.output, read_report(job.output))
