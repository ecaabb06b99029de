# SPDX-License-Identifier: Apache-2.0
"""A regenerated conversation to the rows that are kept of it: rows that ``rows`` reads as it reads anybody's.

Where ids are known, a row is what the target was served, token by token: each prompt with its answer. A prompt that
begins with the prompt and answer before it goes on in their row; where the template rewrites what came before, or the
answer was encoded otherwise, a new row begins. Where ids are not known, the row is the conversation, its answers
trained unless they are cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specforge_core.prompts.reading.row_fields import REGENERATION_KEY
from specforge_core.prompts.regeneration.dialogue import Dialogue, MadeAnswer


@dataclass(slots=True)
class _Served:
    """Tokens as the target was served them, and the last answer in them."""

    input_ids: list[int]
    loss_mask: list[int]
    last: MadeAnswer


def make_rows(prompt_id: str, dialogue: Dialogue, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a conversation that has ended; at least one, for one that failed too.

    :param arguments: the template's variables, which the row keeps, so that it is encoded as it was asked.
    """
    made = [item for item in dialogue.made if item.answer.finish_reason != "failed"]
    served = _serve(made)
    rows = [_row(prompt_id, dialogue, arguments, served=None)] if not served else []
    for number, part in enumerate(served, start=1):
        rows.append(_row(prompt_id if number == 1 else f"{prompt_id}.{number}", dialogue, arguments, served=part))
    rows[-1][REGENERATION_KEY] = {"ending": dialogue.ending, "answers": [_describe(item) for item in dialogue.made]}
    return rows


def _serve(made: Sequence[MadeAnswer]) -> list[_Served]:
    """What was served, in as few rows as hold it exactly; nothing unless the ids of every answer are known."""
    served: list[_Served] = []
    for item in made:
        prompt, answer = item.answer.prompt_ids, item.answer.token_ids
        if not prompt or not answer:
            return []
        before = served[-1].input_ids if served else []
        if served and list(prompt[: len(before)]) == before:
            last = served[-1]
            last.input_ids += [*prompt[len(before) :], *answer]
            last.loss_mask += [0] * (len(prompt) - len(last.loss_mask)) + [1] * len(answer)
            last.last = item
        else:
            served.append(_Served([*prompt, *answer], [0] * len(prompt) + [1] * len(answer), item))
    return served


def _row(prompt_id: str, dialogue: Dialogue, arguments: Mapping[str, Any], *, served: _Served | None) -> dict[str, Any]:
    last = len(dialogue.messages) if served is None else served.last.position + 1
    cut = {item.position for item in dialogue.made if item.answer.finish_reason == "length"}
    row: dict[str, Any] = {"id": prompt_id, "messages": []}
    for position, message in enumerate(dialogue.messages[:last]):
        untrained = {"train": False} if position in dialogue.kept | cut else {}
        row["messages"].append({**message, **untrained})
    if dialogue.source.tools:
        row["tools"] = list(dialogue.source.tools)
    if arguments:
        row["chat_template_kwargs"] = dict(arguments)
    if served is not None:
        row |= {"input_ids": served.input_ids, "loss_mask": served.loss_mask}
    return row


def _describe(item: MadeAnswer) -> dict[str, Any]:
    answer = item.answer
    described: dict[str, Any] = {"finish_reason": answer.finish_reason}
    if answer.usage:
        described["usage"] = dict(answer.usage)
    return described | ({"error": answer.error} if answer.error else {})
