# SPDX-License-Identifier: Apache-2.0
"""``specforge demo``'s target: a small real model, made on this machine from text that every machine has.

No download and no weights: a Qwen3 of some two million parameters with its own tokenizer learns the functions of the
Python standard library in about two minutes on two cores. The demo's prompts are beginnings of such functions with the
corpus's own answers; ``specforge regenerate`` lets the target answer them. Everything lies in the caller's cache
directory, complete or not at all, under a name that holds a fingerprint of corpus, budget and versions: a second demo
finds it there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from specforge_core import DemoTarget
from specforge_core.contracts import DataError, Progress

from specforge_hf_target.demo_corpus import Corpus, Exchange, read_corpus
from specforge_hf_target.progress_bars import without_progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from specforge_hf_target.demo_training import DemoBudget

RECIPE = 2
"""Bumped whenever this module would make another target of the same corpus."""


def prepare_demo(cache_directory: Path, progress: Progress) -> DemoTarget:
    """The demo's target and prompts, made now or found in the cache.

    :raises DataError: the standard library's sources are not on this machine.
    """
    from specforge_hf_target.demo_training import DemoBudget

    return prepare_within(cache_directory, budget=DemoBudget(), progress=progress)


def prepare_within(cache_directory: Path, *, budget: DemoBudget, progress: Progress) -> DemoTarget:
    """:func:`prepare_demo` with a budget of one's own."""
    progress.begin("reading the standard library", None)
    corpus = read_corpus(max_files=budget.max_files)
    if len(corpus.held_out) < budget.held_out_prompts or len(corpus.train) < budget.answered_prompts:
        raise DataError(
            f"the Python standard library here gives only {len(corpus.train)} functions to train on and "
            f"{len(corpus.held_out)} held-out ones; the demo needs {budget.answered_prompts} and "
            f"{budget.held_out_prompts}",
            where="python standard library",
            hint="use a Python that was installed with its .py sources",
        )
    directory = cache_directory / f"demo-target-{_fingerprint(corpus, budget)}"
    if not directory.is_dir():
        aside = cache_directory / f".{directory.name}.{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        _make_directory(aside)
        try:
            _make_target(aside, corpus, budget, progress)
            _publish(aside, directory)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return DemoTarget(
        section={"path": str(directory)},
        train_prompts=directory / "train.jsonl",
        eval_prompts=directory / "eval.jsonl",
        answer_tokens=budget.answer_tokens,
    )


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise DataError(
            f"the demo's target cannot be written: {error.strerror}",
            where=str(directory.parent),
            hint="name another place with --cache",
        ) from error


def _fingerprint(corpus: Corpus, budget: DemoBudget) -> str:
    import torch
    import transformers

    facts = [RECIPE, corpus.fingerprint, asdict(budget), torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _publish(aside: Path, directory: Path) -> None:
    try:
        aside.rename(directory)
    except OSError:
        if not directory.is_dir():  # otherwise another process made the same target meanwhile
            raise


def _make_target(directory: Path, corpus: Corpus, budget: DemoBudget, progress: Progress) -> None:
    """Train and write everything into an empty directory."""
    from specforge_hf_target.demo_tokenizer import train_tokenizer
    from specforge_hf_target.demo_training import build_model, limited_threads, measure_loss, train_target

    texts = [f"user\n{exchange.user}\nassistant\n{exchange.assistant}" for exchange in corpus.train]
    tokenizer = train_tokenizer(texts, vocab_size=budget.vocab_size)
    with limited_threads(budget.threads):
        model = build_model(budget, len(tokenizer))
        train_target(model, _encode(tokenizer, corpus.train, budget.max_tokens), budget=budget, progress=progress)
        held_out = _encode(tokenizer, corpus.held_out, budget.max_tokens)
        loss = measure_loss(model, held_out, batch_tokens=budget.batch_tokens)
        for name, exchanges, count in (
            ("train", corpus.train, budget.answered_prompts),
            ("eval", corpus.held_out, budget.held_out_prompts),
        ):
            lines = _short_enough(tokenizer, _spread(exchanges, count), budget)
            (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    with without_progress_bars():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    facts = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out_loss": loss,
        "train_functions": len(corpus.train),
        "held_out_functions": len(corpus.held_out),
        "budget": asdict(budget),
    }
    (directory / "demo.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _messages(user: str, assistant: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _encode(tokenizer: PreTrainedTokenizerFast, exchanges: Sequence[Exchange], max_tokens: int) -> list[list[int]]:
    texts = [tokenizer.apply_chat_template(_messages(item.user, item.assistant), tokenize=False) for item in exchanges]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [list(row[:max_tokens]) for row in encoded]


def _spread(exchanges: Sequence[Exchange], count: int) -> list[Exchange]:
    """So many exchanges from all over the corpus."""
    return [exchanges[index * len(exchanges) // count] for index in range(count)]


def _short_enough(tokenizer: PreTrainedTokenizerFast, exchanges: Sequence[Exchange], budget: DemoBudget) -> list[str]:
    """One JSON line per exchange whose beginning leaves the target room to answer."""
    texts = [
        tokenizer.apply_chat_template(_messages(item.user, "")[:1], tokenize=False, add_generation_prompt=True)
        for item in exchanges
    ]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    asked = [item for item, ids in zip(exchanges, encoded, strict=True) if len(ids) <= budget.prompt_tokens]
    return [json.dumps({"messages": _messages(item.user, item.assistant)}) + "\n" for item in asked]
