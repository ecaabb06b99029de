# SPDX-License-Identifier: Apache-2.0
"""Answers of a transformers model in this process: batches of prompts, one token for each at a time.

Prompts of a batch are padded at the left and masked; a finished row waits for the others. Shapes: B batch, T tokens,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from specforge_core.contracts import (
    AnswerSource,
    ChatTokenizer,
    GeneratedAnswer,
    GenerationRequest,
    GenerationSettings,
    TargetInfo,
)
from torch import Tensor, nn

from specforge_hf_target.model_files import running


class HfAnswers(AnswerSource):
    """Greedy or sampled answers. What is sampled depends on a request's seed, not on its batch."""

    def __init__(self, model: nn.Module, info: TargetInfo, tokenizer: ChatTokenizer, *, batch_size: int):
        self._model = model
        self._info = info
        self._tokenizer = tokenizer
        self._stops = sorted(tokenizer.stop_token_ids or info.eos_token_ids)
        self._batch_size = batch_size

    @property
    def in_flight(self) -> int:
        return self._batch_size

    def describe(self) -> Mapping[str, str]:
        import transformers

        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        return {"model": self._info.name_or_path, "engine": "transformers in this process", **versions}

    def answer(
        self, requests: Iterable[GenerationRequest | None], settings: GenerationSettings
    ) -> Iterator[GeneratedAnswer]:
        waiting = iter(requests)
        while batch := _take(waiting, self._batch_size):
            yield from self._answer_batch(batch, settings)

    def close(self) -> None:
        """Nothing of its own; the engine keeps the model."""

    def _answer_batch(
        self, batch: Sequence[GenerationRequest], settings: GenerationSettings
    ) -> Iterator[GeneratedAnswer]:
        most = self._info.max_position_embeddings or (1 << 62)
        fitting = [request for request in batch if len(request.input_ids) + settings.max_tokens <= most]
        for request in batch:
            if request not in fitting:
                yield GeneratedAnswer(
                    request.request_id,
                    "failed",
                    error=f"{len(request.input_ids)} tokens of prompt and {settings.max_tokens} of answer are more "
                    f"than the target's {most}",
                )
        if not fitting:
            return
        made = self._decode(fitting, settings)
        for request, token_ids in zip(fitting, made, strict=True):
            ended = bool(token_ids) and token_ids[-1] in self._stops
            yield GeneratedAnswer(
                request.request_id,
                "stop" if ended else "length",
                content=self._tokenizer.decode(token_ids[:-1] if ended else token_ids),
                prompt_ids=list(request.input_ids),
                token_ids=token_ids,
                usage={"prompt_tokens": len(request.input_ids), "completion_tokens": len(token_ids)},
            )

    @torch.no_grad()
    def _decode(self, batch: Sequence[GenerationRequest], settings: GenerationSettings) -> list[list[int]]:
        from transformers import DynamicCache

        device = next(self._model.parameters()).device
        ids_BT, mask_BT = _pad_left([request.input_ids for request in batch])
        ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
        generators = [torch.Generator().manual_seed(request.seed) for request in batch]
        cache, made = DynamicCache(), [list[int]() for _ in batch]
        left = set(range(len(batch)))
        for _ in range(settings.max_tokens):
            positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
            with running(self._info):
                logits_BV = self._model(
                    input_ids=ids_BT,
                    attention_mask=mask_BT,
                    position_ids=positions_BT,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
            chosen = _choose(logits_BV.float().cpu(), settings, generators)
            for row in list(left):
                made[row].append(chosen[row])
                if chosen[row] in self._stops:
                    left.discard(row)
            if not left:
                break
            ids_BT = torch.tensor(chosen, device=device)[:, None]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(batch), 1)], dim=1)
        return made


def _take(requests: Iterator[GenerationRequest | None], most: int) -> list[GenerationRequest]:
    """As many as there are now; empty when there will be no more."""
    batch: list[GenerationRequest] = []
    for request in islice(requests, None):
        if request is None:
            if batch:
                return batch
            continue
        batch.append(request)
        if len(batch) == most:
            break
    return batch


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [B, T]."""
    width = max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask_BT = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    return ids_BT, mask_BT


def _choose(logits_BV: Tensor, settings: GenerationSettings, generators: Sequence[torch.Generator]) -> list[int]:
    if settings.temperature == 0:
        return [int(token) for token in logits_BV.argmax(-1)]
    return [
        _sample(logits_V / settings.temperature, settings, generator)
        for logits_V, generator in zip(logits_BV, generators, strict=True)
    ]


def _sample(logits_V: Tensor, settings: GenerationSettings, generator: torch.Generator) -> int:
    sorted_V, order_V = logits_V.sort(descending=True)
    probabilities_V = sorted_V.softmax(-1)
    if settings.top_k:
        probabilities_V[settings.top_k :] = 0
    before_V = probabilities_V.cumsum(-1) - probabilities_V
    probabilities_V[before_V >= settings.top_p * probabilities_V.sum()] = 0
    return int(order_V[torch.multinomial(probabilities_V, 1, generator=generator)])
