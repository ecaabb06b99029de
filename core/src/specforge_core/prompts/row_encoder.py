# SPDX-License-Identifier: Apache-2.0
"""A chunk of raw rows to samples: what a worker process does, or this process where there is none.

Rows come as ``sources`` read them and leave as the bytes that ``prompt_writer`` appends, so that neither a row's
content nor its tokens are Python objects in the process that reads and writes.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from specforge_core.contracts import ChatTokenizer, DataError
from specforge_core.prompts.conversation import EncodedPrompt, SourceRow
from specforge_core.prompts.masking.encoder import ConversationEncoder
from specforge_core.prompts.reading.raw_rows import Record
from specforge_core.prompts.reading.rows import parse_record

if TYPE_CHECKING:
    from specforge_core.config.run_config import DataSection


@dataclass(frozen=True, slots=True)
class EncodingWork:
    """What encoding rows takes.

    :param tokenizer: called once in each process that encodes, and only if there is text to encode.
    """

    tokenizer: Callable[[], ChatTokenizer]
    settings: DataSection
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of one file, one after the other.

    :param source: the file's place among all.
    :param name: what messages call it; made prompt ids begin with ``label``.
    :param first: how many rows of the file come before these.
    :param failure: why the file cannot be read on; there are no rows then.
    """

    source: int
    name: str
    label: str
    first: int
    records: Sequence[Record] = ()
    failure: DataError | None = None

    def __str__(self) -> str:
        return f"{self.name}:{self.records[0].number} to {self.records[-1].number}" if self.records else self.name


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as it is written.

    :param input_ids: int32 of this machine's byte order.
    :param loss_mask: a byte for each.
    """

    prompt_id: bytes
    input_ids: bytes
    loss_mask: bytes


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """What became of one row.

    :param number: its line, or its place in the file.
    :param dropped: samples without a trained token.
    :param encoded: whether the tokenizer was used.
    :param error: why the row cannot be used.
    """

    number: int
    samples: Sequence[Sample] = ()
    dropped: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    encoded: bool = False
    error: DataError | None = None


@dataclass(frozen=True, slots=True)
class ChunkOutcome:
    """What became of a chunk's rows.

    :param tokenizer: the fingerprint of the tokenizer; "" if none was made.
    """

    rows: Sequence[RowOutcome]
    tokenizer: str = ""


class RowEncoder:
    """Encodes rows with one tokenizer, which is made when the first row needs it."""

    def __init__(self, work: EncodingWork) -> None:
        self._work = work
        self._settings = work.settings
        self._encoder: ConversationEncoder | None = None
        self._fingerprint = ""

    def encode(self, chunk: Chunk) -> ChunkOutcome:
        """:raises DataError: the file cannot be read on here. :raises TargetError: there is no tokenizer to be had."""
        if chunk.failure is not None:
            raise chunk.failure
        rows = [
            self._encode_record(record, prompt_id=f"{chunk.label}-{number:05d}", where=f"{chunk.name}:{record.number}")
            for number, record in enumerate(chunk.records, start=chunk.first)
        ]
        return ChunkOutcome(rows, self._fingerprint)

    def _encode_record(self, record: Record, *, prompt_id: str, where: str) -> RowOutcome:
        try:
            row = parse_record(record, prompt_id=prompt_id, where=where, mapping=self._settings.mapping)
            return self._encode_row(row, record.number)
        except DataError as error:
            return RowOutcome(record.number, error=error)

    def _encode_row(self, row: SourceRow, number: int) -> RowOutcome:
        encoded, counts = self._encode_content(row)
        if row.cut_answers:
            counts["answers_cut"] += row.cut_answers
        samples = []
        for place, prompt in enumerate(encoded, start=1):
            counts.update(prompt.counts)
            if any(prompt.loss_mask):
                self._check_vocabulary(prompt, row)
                prompt_id = row.prompt_id if self._settings.samples == "conversation" else f"{row.prompt_id}.{place}"
                ids, mask = array("i", prompt.input_ids).tobytes(), bytes(prompt.loss_mask)
                samples.append(Sample(prompt_id.encode(), ids, mask))
        return RowOutcome(
            number,
            samples,
            dropped=len(encoded) - len(samples),
            counts=dict(counts),
            unused=row.unused,
            encoded=row.conversation is not None or row.text is not None,
        )

    def _encode_content(self, row: SourceRow) -> tuple[list[EncodedPrompt], Counter[str]]:
        counts: Counter[str] = Counter()
        if row.input_ids:
            if row.conversation is not None:
                counts["reencoded_alike" if self._gives(row) else "reencoded_otherwise"] += 1
            most = self._settings.max_length
            counts["cut"] += len(row.input_ids) > most
            return [EncodedPrompt(row.input_ids[:most], row.loss_mask[:most])], counts
        if row.text is not None:
            return [self._conversations().encode_text(row.text, row.spans)], counts
        if row.conversation is None:
            raise DataError("holds neither a conversation nor text nor tokens", where=row.where)
        return self._conversations().encode(row.conversation, where=row.where), counts

    def _gives(self, row: SourceRow) -> bool:
        """Whether encoding the row's conversation gives the tokens that the row says it is.

        Those of a served answer may end sooner: with its last token, where the template goes on.
        """
        if row.conversation is None:
            return False
        try:
            encoded = self._conversations().encode(row.conversation, where=row.where)
        except DataError:
            return False
        own = list(row.input_ids[: self._settings.max_length])
        return bool(encoded) and list(encoded[-1].input_ids[: len(own)]) == own

    def _check_vocabulary(self, prompt: EncodedPrompt, row: SourceRow) -> None:
        if max(prompt.input_ids) >= self._work.vocab_size:
            raise DataError(
                f"vocabulary mismatch: token id {max(prompt.input_ids)} in sample {row.prompt_id}, "
                f"but the target's vocabulary has {self._work.vocab_size}",
                where=row.where,
                hint="use the target's own tokenizer",
            )

    def _conversations(self) -> ConversationEncoder:
        if self._encoder is None:
            tokenizer = self._work.tokenizer()
            self._fingerprint = tokenizer.fingerprint
            self._encoder = ConversationEncoder(tokenizer, self._settings)
        return self._encoder
