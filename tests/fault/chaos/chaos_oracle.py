# SPDX-License-Identifier: Apache-2.0
"""What a run must have done, computed from its prompts alone, and whether it did: whatever happened to it meanwhile."""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

EPOCHS = 40
SEED = 3
WINDOW = 8


@dataclass(frozen=True)
class Result:
    """What an uninterrupted run ends with."""

    tensors: str
    losses: list[float]


def prompt_ids(run: Path, split: str) -> list[str]:
    """The prompts' ids, in the order of the prepared prompts."""
    from specforge_core.prompts.prompt_set import PromptSet

    prompts = PromptSet.open(run / "features" / split / "prompts")
    return [prompts.prompt_id(index) for index in range(len(prompts))]


def expected_windows(prompts: list[str]) -> Iterator[list[str]]:
    """The samples of every window: the order of an epoch depends on the seed alone."""
    for epoch in range(EPOCHS):
        digest = hashlib.blake2b(f"order:{SEED}:{epoch}".encode(), digest_size=8).digest()
        generator = random.Random(int.from_bytes(digest, "big") >> 1)
        keys = [generator.random() for _ in prompts]
        order = [prompts[index] for index in sorted(range(len(prompts)), key=keys.__getitem__)]
        for first in range(0, len(order), WINDOW):
            yield [f"{prompt}.e{epoch}" for prompt in order[first : first + WINDOW]]


def result_of(run: Path) -> Result:
    """The last checkpoint's tensors (draft and optimizer) and every step's loss."""
    name = (run / "checkpoints" / "latest").read_text().strip()
    digest = hashlib.sha256(name.encode())
    for path in sorted((run / "checkpoints" / name / "tensors").rglob("*.safetensors")):
        digest.update(path.read_bytes())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1)), "metrics.jsonl has gaps or repeats"
    return Result(digest.hexdigest(), [step["loss"] for step in steps])


def problems_of(run: Path, reference: Result) -> list[str]:
    """How the finished run differs from one that nothing happened to."""
    problems = []
    result = result_of(run)
    if result.losses != reference.losses:
        pairs = zip(result.losses, reference.losses, strict=False)
        first = next((step for step, (a, b) in enumerate(pairs, 1) if a != b), len(result.losses))
        problems.append(f"losses differ from step {first} on ({len(result.losses)} of {len(reference.losses)} steps)")
    if result.tensors != reference.tensors:
        problems.append("the last checkpoint's tensors differ")
    return problems + _ledger_problems(run)


def _ledger_problems(run: Path) -> list[str]:
    windows = list(expected_windows(prompt_ids(run, "train")))
    with closing(sqlite3.connect(f"file:{run / 'ledger.sqlite'}?mode=ro", uri=True)) as ledger:
        deals = list(ledger.execute("SELECT step, sample_id, generation, trained FROM deals ORDER BY step, place"))
        unfreed = [row[0] for row in ledger.execute("SELECT sample_id FROM samples WHERE freed = 0")]
    problems = []
    got: dict[int, list[str]] = {}
    for step, sample, generation, trained in deals:
        got.setdefault(step, []).append(sample)
        if not trained:
            problems.append(f"ledger: {sample} was dealt to window {step} and not trained")
        if generation < 1:
            problems.append(f"ledger: {sample} of window {step} was skipped")
    for index, window in enumerate(windows):
        if got.get(index) != window:
            problems.append(f"ledger: window {index} holds {got.get(index)}, not {window}")
    counts = Counter(sample for step, samples in got.items() if step >= 0 for sample in samples)
    problems += [f"ledger: {sample} trained {count} times" for sample, count in counts.items() if count > 1]
    held_out = sorted(sample for step, samples in got.items() if step < 0 for sample in samples)
    if len(held_out) != len(set(held_out)) or len(held_out) != len(prompt_ids(run, "eval")):
        problems.append(f"ledger: held-out samples are {held_out}")
    if max(got) >= len(windows):
        problems.append(f"ledger: window {max(got)} is one too many")
    return problems + [f"ledger: features of {sample} were never freed" for sample in unfreed]
