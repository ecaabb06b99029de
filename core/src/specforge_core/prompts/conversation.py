# SPDX-License-Identifier: Apache-2.0
"""Conversations as the chat template gets them, and what became of them: the records between the steps of the stage.

``rows`` makes a ``SourceRow`` of whatever a file holds, ``encoder`` makes ``EncodedPrompt`` of its conversation, and
``prepare`` keeps that and adds up the counts for the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]
"""``role``, ``content`` (text, text parts or None) and whatever else the row says of the turn: ``reasoning_content``,
``tool_calls``, ``name``, ``tool_call_id``. Roles are system, developer, user, assistant, tool."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation, as it is rendered.

    :param tools: tool definitions for the template, as the row gives them.
    :param untrained: indices of assistant messages that the row says not to train (``weight: 0``, ``train: false``).
    :param template_arguments: the row's own template variables; they win over those of the run file.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    untrained: frozenset[int] = frozenset()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a source, understood: a conversation, rendered text with trained spans, or token ids with a mask.

    A row with token ids may have its conversation too, which then only checks them.

    :param where: file and row, for errors.
    :param text: the rendered text, and ``spans``: characters [start, end) of it that are trained.
    :param cut_answers: answers that their server stopped early (``finish_reason`` length); they are not trained.
    :param unused: keys of the row that nothing was made of (``messages[].key`` for those of turns).
    """

    prompt_id: str
    where: str
    conversation: Conversation | None = None
    text: str | None = None
    spans: Sequence[tuple[int, int]] = ()
    input_ids: Sequence[int] = ()
    loss_mask: Sequence[int] = ()
    cut_answers: int = 0
    unused: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids and mask of one sample, cut to the length limit, and what is to be counted of it.

    :param counts: by the names in ``report.COUNTS``.
    """

    input_ids: Sequence[int]
    loss_mask: Sequence[int]
    counts: Mapping[str, int] = field(default_factory=dict)
