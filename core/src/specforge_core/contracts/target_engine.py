# SPDX-License-Identifier: Apache-2.0
"""Target engines run the target model: they capture features, hand out frozen weights and, where they can, decode."""

from __future__ import annotations

import datetime
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from specforge_core.contracts.decoding import TargetDecoder
from specforge_core.contracts.errors import TargetError
from specforge_core.contracts.generation import AnswerSource
from specforge_core.contracts.records import CaptureRequest, Norm, Prompt, Sample, TargetInfo

if TYPE_CHECKING:
    from torch import Tensor

EMBED_TOKENS = "embed_tokens.weight"
FINAL_NORM = "norm.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class EngineCapabilities:
    """What an engine can capture and whether it can decode in this process."""

    norms: tuple[Norm, ...] = ("pre", "post")
    aux_layers: bool = True
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    decodes: bool = False


class FrozenSource(Protocol):
    """Where a strategy gets what it needs of the target and the data to construct its draft."""

    @property
    def info(self) -> TargetInfo: ...

    def frozen_weights(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """The target's ``embed_tokens.weight`` [V, H], ``norm.weight`` [H] or ``lm_head.weight`` [V, H] by name."""
        ...

    def token_counts(self) -> Tensor:
        """How often each target token id stands at a trained position of the training data: int64 [V].

        :raises DataError: no training data is at hand (a bench of an export, say).
        """
        ...


class TargetEngine(ABC):
    """A target model. Constructing one is light; weights are loaded by the first call that needs them."""

    @property
    @abstractmethod
    def info(self) -> TargetInfo:
        """Layers, sizes, vocabulary and dtype."""

    @abstractmethod
    def capture(self, prompts: Sequence[Prompt], request: CaptureRequest, epoch: int) -> Iterator[Sample]:
        """One prefill over ``prompts`` as one batch; yields one sample per prompt, in order.

        The same prompts in the same batch give the same bits.

        :raises TargetError: the target cannot be loaded or cannot capture what is asked.
        """

    @abstractmethod
    def frozen_weights(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Copies of the named weights in the target's dtype, on CPU, without loading the rest of the model.

        Tied heads are returned under both names.

        :raises TargetError: a name the target does not have.
        """

    def decoder(self, request: CaptureRequest) -> TargetDecoder:
        """A decoder with an empty cache that also returns what ``request`` asks for.

        :raises TargetError: this engine captures only.
        """
        raise TargetError(f"{type(self).__name__} captures features but cannot decode in this process")

    def answers(self, tokenizer: ChatTokenizer, *, batch_size: int) -> AnswerSource:
        """A source of answers by this target, on this engine.

        :param tokenizer: tells what ends an answer, and decodes it.
        :param batch_size: answers made at once.
        :raises TargetError: this engine captures only.
        """
        raise TargetError(
            f"{type(self).__name__} captures features but cannot answer in this process",
            hint="name servers under regenerate",
        )

    @abstractmethod
    def health(self) -> None:
        """Return if the engine can serve; raise TargetError with the reason if not. Bounded in time."""

    @abstractmethod
    def close(self) -> None:
        """Give back memory and connections. Idempotent."""


class EncodedText(Protocol):
    """Token ids of a text, and where they stand in it."""

    @property
    def input_ids(self) -> Sequence[int]: ...

    def tokens_between(self, start: int, end: int) -> tuple[int, int]:
        """The tokens [first, stop) that overlap the characters [start, end)."""
        ...


@dataclass(frozen=True, slots=True)
class TextWithOffsets:
    """An ``EncodedText`` by the character span [start, end) of each token."""

    input_ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]

    def tokens_between(self, start: int, end: int) -> tuple[int, int]:
        first = bisect_right(self.offsets, start, key=lambda span: span[1])
        stop = bisect_left(self.offsets, end, key=lambda span: span[0])
        return first, max(first, stop)


@dataclass(frozen=True, slots=True)
class RenderedText:
    """A conversation as text.

    :param marked: spans [start, end) of it that the template marks as the assistant's; None if it marks none.
    """

    text: str
    marked: Sequence[tuple[int, int]] | None = None


class ChatTokenizer(Protocol):
    """The target's tokenizer and chat template, as far as preparing prompts needs them."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same conversation could encode differently."""
        ...

    @property
    def special_token_ids(self) -> frozenset[int]: ...

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """What ends an answer when the target is served: its generation config's end tokens, or the tokenizer's."""
        ...

    @property
    def template(self) -> str:
        """The chat template's source; "" where there is none."""
        ...

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
    ) -> RenderedText:
        """The chat template applied to a conversation.

        :param arguments: further variables of the template.
        :param date: what the template is told today is; default: the machine's date.
        :raises DataError: the template refuses the conversation, or fails on it, however that may be.
        """
        ...

    def encode(self, text: str) -> EncodedText:
        """Encode rendered text as it stands; no special tokens are added."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str: ...
