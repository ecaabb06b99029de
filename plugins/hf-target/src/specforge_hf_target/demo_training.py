# SPDX-License-Identifier: Apache-2.0
"""Trains the demo's target from scratch. CPU only, with a chosen number of threads.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from specforge_core.contracts import Progress
from torch import Tensor, nn

from specforge_hf_target.demo_tokenizer import PAD_ID, TURN_END_ID

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

LEARNING_RATE = 4e-3
WARMUP_STEPS = 20
MAX_GRAD_NORM = 1.0
WEIGHT_DECAY = 0.05
IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoBudget:
    """How large the demo's target is and how long it is trained. Counts, not seconds, so that results repeat.

    :param batch_tokens: tokens per optimizer step, padding included.
    :param answered_prompts: training prompts, for the target to answer; the draft is trained on the answers.
    """

    vocab_size: int = 2048
    hidden_size: int = 192
    num_layers: int = 4
    steps: int = 900
    batch_tokens: int = 1024
    max_tokens: int = 256
    answered_prompts: int = 1536
    held_out_prompts: int = 64
    prompt_tokens: int = 96
    answer_tokens: int = 96
    max_files: int | None = None
    threads: int = 2


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """Run with so many torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build_model(budget: DemoBudget, vocab_size: int) -> Qwen3ForCausalLM:
    """A Qwen3 with tied embeddings and seeded random weights, heads of 32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=budget.hidden_size,
        intermediate_size=3 * budget.hidden_size,
        num_hidden_layers=budget.num_layers,
        num_attention_heads=budget.hidden_size // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=TURN_END_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config)


def train_target(
    model: Qwen3ForCausalLM, rows: Sequence[Sequence[int]], *, budget: DemoBudget, progress: Progress
) -> None:
    """Train on every token of every row, in epochs of batches of similar length; the rate falls linearly to zero."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
    )
    progress.begin("training the demo's target", budget.steps)
    model.train()
    batches = _repeat_batches(rows, budget.batch_tokens)
    for step in range(budget.steps):
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm * min(1.0, 2 * (1 - step / budget.steps))
        loss = _mean_loss(model, next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        progress.advance(1, loss=float(loss.detach()))
    model.eval()


def measure_loss(model: Qwen3ForCausalLM, rows: Sequence[Sequence[int]], *, batch_tokens: int) -> float:
    """Mean cross-entropy per token, in nats."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in _cut_batches(rows, batch_tokens, random.Random(0)):
            tokens = sum(len(row) - 1 for row in batch)
            total += float(_mean_loss(model, batch)) * tokens
            count += tokens
    return total / count if count else math.nan


def _mean_loss(model: Qwen3ForCausalLM, batch: Sequence[Sequence[int]]) -> Tensor:
    """Mean cross-entropy of one batch of rows, padded at the right (causal attention never sees the padding)."""
    width = max(len(row) for row in batch)
    ids_BT = torch.full((len(batch), width), PAD_ID)
    labels_BT = torch.full((len(batch), width), IGNORED)
    for index, row in enumerate(batch):
        ids_BT[index, : len(row)] = labels_BT[index, : len(row)] = torch.tensor(row)
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED)


def _repeat_batches(rows: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[Sequence[int]]]:
    rng = random.Random(0)
    while True:
        yield from _cut_batches(rows, batch_tokens, rng)


def _cut_batches(rows: Sequence[Sequence[int]], batch_tokens: int, rng: random.Random) -> list[list[Sequence[int]]]:
    """Rows of similar length together, at least ``batch_tokens`` each where there are enough, in random order."""
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index]), rng.random()))
    batches: list[list[Sequence[int]]] = [[]]
    for index in order:
        batches[-1].append(rows[index])
        if len(batches[-1]) * len(rows[index]) >= batch_tokens:
            batches.append([])
    filled = [batch for batch in batches if batch]
    rng.shuffle(filled)
    return filled
