# SPDX-License-Identifier: Apache-2.0
"""Sources to a prompt set, once: what was prepared before is opened again as long as nothing it came from changed.

This is the stage's way in: ``sources`` gives rows, ``encoder_processes`` makes samples of them, ``partial_set`` keeps
those until all are there, ``report`` counts. Some chunks of rows are in memory. The same set comes out, byte for byte,
for any number of workers and after any kill.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge_core.contracts import ChatTokenizer, DataError, Progress
from specforge_core.prompts.directory_lock import LockHolder, locked
from specforge_core.prompts.encoder_processes import encode_in_order
from specforge_core.prompts.partial_set import PartialSet, remove_partial
from specforge_core.prompts.prompt_manifest import DamagedPrompts
from specforge_core.prompts.prompt_set import PromptSet
from specforge_core.prompts.prompt_writer import nothing_trained, remove_leftovers
from specforge_core.prompts.reading.raw_rows import Record
from specforge_core.prompts.reading.row_fields import check_mapping
from specforge_core.prompts.reading.sources import SourceFile, find_files, read_records
from specforge_core.prompts.report import SourceReport, describe_lengths
from specforge_core.prompts.row_encoder import Chunk, ChunkOutcome, EncodingWork, RowOutcome
from specforge_core.prompts.set_origin import SetOrigin, describe_sources, make_rules

if TYPE_CHECKING:
    from specforge_core.config.run_config import DataSection, HubSource

_log = logging.getLogger(__name__)

SAVE_SECONDS = 3.0
"""What a kill costs at most; saving takes hundredths of a second."""
_CHUNK_ROWS, _CHUNK_BYTES = 32, 1 << 20
"""Sent together at most: some tens of milliseconds of encoding, so that what is done for each chunk costs little."""
_MAX_REJECTS = 100_000
"""Lines of the rejects file, whatever ``data.max_bad_rows`` allows."""
_SHOWN_CHARACTERS = 500


def prepare_prompts(
    sources: Sequence[Path | HubSource],
    *,
    directory: Path,
    tokenizer: Callable[[], ChatTokenizer],
    settings: DataSection,
    vocab_size: int,
    progress: Progress,
) -> PromptSet:
    """Prompts of ``sources``, cut to ``settings.max_length``, without those that train nothing.

    :param directory: where the prompt set is kept; replaced when sources, settings or tokenizer changed.
    :param tokenizer: called only if there is text to encode; a ``TokenizerFactory`` is sent to worker processes,
        anything else encodes in this one.
    :param settings: ``max_prompts`` applies to these sources, whichever they are.
    :raises DataError: sources missing, empty or malformed; a token id the target does not have.
    :raises WorkerLost: a worker process died or stopped; what was prepared is kept.
    """
    with locked(directory, progress=progress) as holder:
        remove_leftovers(directory)
        check_mapping(settings.mapping)
        files = find_files(sources)
        origin = SetOrigin(describe_sources(files, directory), make_rules(settings, vocab_size))
        prepared = _reopen(directory, origin, tokenizer)
        if prepared is None:
            work = EncodingWork(tokenizer, settings, vocab_size)
            with PartialSet(directory, key=origin.fingerprint("")) as partial:
                _Preparation(files, work, partial, progress=progress, holder=holder).run(origin, directory)
            prepared = PromptSet.open(directory)
        else:
            remove_partial(directory)
        return prepared


def _reopen(directory: Path, origin: SetOrigin, tokenizer: Callable[[], ChatTokenizer]) -> PromptSet | None:
    """What was prepared before, if it is whole and came from the same. A damaged or older set is prepared anew."""
    try:
        prepared = PromptSet.open(directory)
    except DamagedPrompts as error:
        _log.warning("%s: %s; they are prepared anew", error.where, error.message)
        return None
    except DataError:
        return None
    used = prepared.manifest["tokenizer"]
    if prepared.fingerprint != origin.fingerprint(used) or prepared.largest_token_id >= origin.rules["vocab_size"]:
        return None
    return prepared if not used or tokenizer().fingerprint == used else None


class _Preparation:
    """Appends what becomes of each row to the partial set, in order, and counts it."""

    def __init__(
        self,
        files: Sequence[SourceFile],
        work: EncodingWork,
        partial: PartialSet,
        *,
        progress: Progress,
        holder: LockHolder,
    ) -> None:
        self._files = files
        self._work = work
        self._partial = partial
        self._progress = progress
        self._holder = holder
        self._reports = [SourceReport(file.name) for file in files]
        self._source = self._row = self._dropped = self._rejected = 0
        self._tokenizer = ""
        self._resume()

    def _resume(self) -> None:
        state = self._partial.state
        if not state:
            return
        if state["tokenizer"] and state["tokenizer"] != self._work.tokenizer().fingerprint:
            self._partial.restart()
            return
        self._source, self._row, self._tokenizer = state["source"], state["row"], state["tokenizer"]
        self._reports = [SourceReport.restore(entry) for entry in state["reports"]]
        self._dropped = sum(report.dropped for report in self._reports)
        self._rejected = sum(report.rejected.total() for report in self._reports)

    def _state(self) -> dict[str, Any]:
        reports = [report.as_json() for report in self._reports]
        return {"source": self._source, "row": self._row, "tokenizer": self._tokenizer, "reports": reports}

    @property
    def _full(self) -> bool:
        most = self._work.settings.max_prompts
        return most is not None and self._partial.prompts >= most

    def run(self, origin: SetOrigin, directory: Path) -> None:
        """Prepare what is left to prepare, and make the set visible."""
        self._holder.total = self._work.settings.max_prompts
        self._progress.begin("preparing", self._holder.total)
        self._show(sum(report.rows for report in self._reports))
        saved = time.monotonic()
        for chunk, outcome in encode_in_order(self._chunks(), self._work, workers=self._work.settings.workers):
            self._take(chunk, outcome)
            if self._full:
                break
            if time.monotonic() - saved >= SAVE_SECONDS:
                self._partial.save(self._state())
                saved = time.monotonic()
        if not self._partial.prompts:
            rejected = f", {self._rejected} rows could not be used" if self._rejected else ""
            raise nothing_trained(directory, f"{self._dropped} dropped{rejected}")
        self._partial.finish(
            fingerprint=origin.fingerprint(self._tokenizer),
            dropped=self._dropped,
            details={"sources": origin.sources, "tokenizer": self._tokenizer, "report": self._make_report()},
        )

    def _chunks(self) -> Iterator[Chunk]:
        """The rows that are left, and in its place among them the error that ends reading."""
        for source, file in enumerate(self._files[self._source :], start=self._source):
            done = self._row if source == self._source else 0
            try:
                yield from self._chunks_of(file, source, done)
            except DataError as error:
                yield Chunk(source, file.name, file.label, 0, failure=error)
                return

    def _chunks_of(self, file: SourceFile, source: int, done: int) -> Iterator[Chunk]:
        records: list[Record] = []
        count, size = -1, 0
        for count, record in enumerate(read_records(file, self._work.settings.mapping)):
            if count < done:
                continue
            records.append(record)
            size += record.size
            if len(records) == _CHUNK_ROWS or size >= _CHUNK_BYTES:
                yield Chunk(source, file.name, file.label, count + 1 - len(records), tuple(records))
                records, size = [], 0
        if records:
            yield Chunk(source, file.name, file.label, count + 1 - len(records), tuple(records))
        if count < 0:
            raise DataError("holds no prompts", where=file.name, hint="one JSON object per line")

    def _take(self, chunk: Chunk, outcome: ChunkOutcome) -> None:
        self._source, self._row = chunk.source, chunk.first
        for row in outcome.rows:
            if self._full:
                break
            self._take_row(row, chunk)
            if row.encoded:
                self._tokenizer = outcome.tokenizer
            self._row += 1
        self._show(self._row - chunk.first)

    def _show(self, rows: int) -> None:
        self._holder.rows += rows
        shown = {"rejected": self._rejected} if self._rejected else {}
        self._progress.advance(rows, dropped=self._dropped, **shown)

    def _take_row(self, row: RowOutcome, chunk: Chunk) -> None:
        report = self._reports[chunk.source]
        report.rows += 1
        error = row.error or self._find_same_id(row, chunk)
        if error is not None:
            self._reject(error, row, report)
            return
        report.add(row)
        self._dropped += row.dropped
        for sample in row.samples:
            if not self._full:
                report.add_sample(sample)
                self._partial.add(sample, chunk.source, row.number)

    def _find_same_id(self, row: RowOutcome, chunk: Chunk) -> DataError | None:
        for sample in row.samples:
            found = self._partial.find(sample.prompt_id)
            if found is not None:
                return DataError(
                    f"id {sample.prompt_id.decode()!r} is also that of {self._files[found[0]].name}:{found[1]}",
                    where=f"{chunk.name}:{row.number}",
                    hint="ids must be unique over all files; leave them out to have them made",
                )
        return None

    def _reject(self, error: DataError, row: RowOutcome, report: SourceReport) -> None:
        """:raises DataError: the run ends at such a row, or at so many of them."""
        settings = self._work.settings
        if settings.on_bad_row == "stop":
            raise error
        report.reject(error)
        self._rejected += 1
        if self._rejected > settings.max_bad_rows:
            raise DataError(
                f"{self._rejected} rows cannot be used, data.max_bad_rows allows {settings.max_bad_rows}; "
                f"the last: {error.message[:_SHOWN_CHARACTERS]}",
                where=error.where,
                hint=error.hint,
            )
        if self._rejected <= _MAX_REJECTS:
            entry = {"source": report.name, "row": row.number, "where": error.where, "reason": error.message}
            shown = {name: text[:_SHOWN_CHARACTERS] for name, text in entry.items() if isinstance(text, str)}
            self._partial.reject({**entry, **shown, "hint": error.hint[:_SHOWN_CHARACTERS]})

    def _make_report(self) -> list[dict[str, Any]]:
        entries, first = [], 0
        for report in self._reports:
            lengths = self._partial.lengths(first, first + report.samples)
            entries.append(report.as_json() | {"lengths": describe_lengths(lengths)})
            first += report.samples
        return entries
