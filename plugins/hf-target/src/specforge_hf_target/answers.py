# SPDX-License-Identifier: Apache-2.0
"""The target's own answers, made in batches with a key-value cache, each token chosen as the request says.

Prompts are padded at the left. Answers that have ended leave the batch once they are half of it, so that the last long
one does not pay for all. Greedily, a batch gives the same answers each time; another batch may differ where two tokens
are equally likely to rounding.

Shapes: B answers that go on, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from specforge_core.contracts import GeneratedAnswer, GenerationRequest, GenerationSettings, TargetInfo
from torch import Tensor, nn

from specforge_hf_target.model_files import running

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class _Answer:
    """One answer on its way.

    :param most: tokens it may have.
    """

    request: GenerationRequest
    most: int
    token_ids: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None


class HfAnswers:
    """An ``AnswerSource`` over a model that is loaded when the first request comes."""

    answers_together = True

    def __init__(
        self, load: Callable[[], PreTrainedModel], info: TargetInfo, *, stop_token_ids: Collection[int], batch_size: int
    ):
        self._load = load
        self._info = info
        self._stop = frozenset(stop_token_ids)
        self._batch_size = batch_size

    def describe(self) -> Mapping[str, str]:
        return {
            "engine": "hf",
            "model": f"{self._name()} {self._info.dtype}",
            "transformers": version("transformers"),
            "torch": torch.__version__,
        }

    def answer(
        self, requests: Iterable[GenerationRequest | None], settings: GenerationSettings
    ) -> Iterator[GeneratedAnswer]:
        waiting = iter(requests)
        while batch := list(islice(iter(lambda: next(waiting, None), None), self._batch_size)):
            fitting = []
            for request in batch:
                problem = self._find_problem(request)
                if problem:
                    yield GeneratedAnswer(request.request_id, "failed", error=problem)
                else:
                    fitting.append(self._begin(request, settings))
            if fitting:
                with running(self._info), torch.no_grad():
                    _Batch(self._load(), fitting, settings, stop=self._stop).run()
            yield from map(self._finished, fitting)

    def _name(self) -> str:
        """The model's name, or its directory's, wherever that lies on this machine."""
        name = self._info.name_or_path
        return Path(name).resolve().name if Path(name).exists() else name

    def close(self) -> None:
        """The engine's model stays."""

    def _find_problem(self, request: GenerationRequest) -> str:
        """Why a prompt cannot be answered: a token id beyond the embedding ends the process on some devices."""
        ids = request.input_ids
        if not ids:
            return "the prompt has no tokens"
        if min(ids) < 0 or max(ids) >= self._info.vocab_size:
            return f"the prompt has token id {max(ids)}, the target's vocabulary {self._info.vocab_size} tokens"
        if len(ids) >= self._info.max_position_embeddings:
            return f"the prompt is as long as the target's context, {self._info.max_position_embeddings} tokens"
        return ""

    def _begin(self, request: GenerationRequest, settings: GenerationSettings) -> _Answer:
        room = self._info.max_position_embeddings - len(request.input_ids)
        answer = _Answer(request, min(settings.max_tokens, room))
        if settings.temperature > 0:
            answer.generator = torch.Generator().manual_seed(request.seed)
        return answer

    def _finished(self, answer: _Answer) -> GeneratedAnswer:
        ended = bool(answer.token_ids) and answer.token_ids[-1] in self._stop
        return GeneratedAnswer(
            answer.request.request_id,
            "stop" if ended else "length",
            prompt_ids=answer.request.input_ids,
            token_ids=answer.token_ids,
            usage={"prompt_tokens": len(answer.request.input_ids), "completion_tokens": len(answer.token_ids)},
        )


class _Batch:
    """Answers that are made together."""

    def __init__(
        self, model: PreTrainedModel, answers: Sequence[_Answer], settings: GenerationSettings, *, stop: Collection[int]
    ) -> None:
        from transformers import DynamicCache

        self._model = model
        self._settings = settings
        self._stop = stop
        self._device = next(model.parameters()).device
        self._cache = DynamicCache(config=model.config)
        knows = "logits_to_keep" in inspect.signature(model.forward).parameters  # a model's own code may not
        self._last_only = {"logits_to_keep": 1} if knows else {}
        self._rows: list[_Answer | None] = list(answers)
        longest = max(len(answer.request.input_ids) for answer in answers)
        self._input_BT = torch.zeros(len(answers), longest, dtype=torch.int64)
        self._mask_BT = torch.zeros(len(answers), longest, dtype=torch.int64)
        for row, answer in enumerate(answers):
            ids = torch.tensor(answer.request.input_ids)
            self._input_BT[row, longest - len(ids) :] = ids
            self._mask_BT[row, longest - len(ids) :] = 1
        self._position_BT = (self._mask_BT.cumsum(-1) - 1).clamp(min=0)

    def run(self) -> None:
        """Extend the answers until each ended or has its most tokens."""
        while any(self._rows):
            logits_BV = self._forward()
            chosen_B = self._choose(logits_BV)
            for row, (answer, token) in enumerate(zip(self._rows, chosen_B.tolist(), strict=True)):
                if answer is None:
                    continue
                answer.token_ids.append(token)
                if token in self._stop or len(answer.token_ids) >= answer.most:
                    self._rows[row] = None
            self._input_BT = chosen_B[:, None]
            self._mask_BT = nn.functional.pad(self._mask_BT, (0, 1), value=1)
            self._position_BT = self._position_BT[:, -1:] + 1
            if 2 * sum(answer is not None for answer in self._rows) <= len(self._rows):
                self._drop_ended()

    def _forward(self) -> Tensor:
        """float32 [B, V] on CPU: what may come next."""
        output = self._model(
            input_ids=self._input_BT.to(self._device),
            attention_mask=self._mask_BT.to(self._device),
            position_ids=self._position_BT.to(self._device),
            past_key_values=self._cache,
            use_cache=True,
            **self._last_only,
        )
        last_BV: Tensor = output.logits[:, -1]
        return last_BV.float() if self._settings.temperature > 0 else last_BV

    def _choose(self, logits_BV: Tensor) -> Tensor:
        """int64 [B] on CPU."""
        if self._settings.temperature == 0:
            return logits_BV.argmax(-1).cpu()
        kept_BV = _keep_likely(logits_BV.cpu() / self._settings.temperature, self._settings)
        chosen_B = kept_BV.argmax(-1)
        for row, answer in enumerate(self._rows):
            if answer is not None:
                probabilities_V = torch.softmax(kept_BV[row], dim=-1)
                chosen_B[row] = torch.multinomial(probabilities_V, 1, generator=answer.generator)[0]
        return chosen_B

    def _drop_ended(self) -> None:
        going = [row for row, answer in enumerate(self._rows) if answer is not None]
        if not going:
            return
        kept = torch.tensor(going)
        self._rows = [self._rows[row] for row in going]
        self._cache.batch_select_indices(kept.to(self._device))
        self._input_BT, self._mask_BT = self._input_BT[kept], self._mask_BT[kept]
        self._position_BT = self._position_BT[kept]


def _keep_likely(logits_BV: Tensor, settings: GenerationSettings) -> Tensor:
    """Without what ``top_k`` and ``top_p`` leave out; the likeliest token always stays."""
    if 0 < settings.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(settings.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
    if settings.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        before_BV = sorted_BV.softmax(dim=-1).cumsum(dim=-1) - sorted_BV.softmax(dim=-1)
        left_out_BV: Any = torch.zeros_like(before_BV, dtype=torch.bool)
        left_out_BV.scatter_(-1, order_BV, before_BV >= settings.top_p)
        logits_BV = logits_BV.masked_fill(left_out_BV, float("-inf"))
    return logits_BV
