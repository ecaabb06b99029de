# SPDX-License-Identifier: Apache-2.0
"""The order of prompts in each epoch, and the seed of each sample: pure functions of the run's seed.

Both halves of a run compute them on their own, and a resumed run computes them again, so they use only what Python
promises to keep: BLAKE2 digests and the Mersenne Twister's ``random()``.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence


def sample_seed(run_seed: int, epoch: int, prompt_id: str) -> int:
    """The seed (63 bits) of everything random about one prompt in one training epoch."""
    return _digest(f"sample:{run_seed}:{epoch}:{prompt_id}")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class PromptOrder:
    """In which order an epoch walks through prompts ``0 … num_prompts - 1``."""

    def __init__(self, num_prompts: int, *, seed: int, shuffle: bool) -> None:
        self.num_prompts = num_prompts
        self._seed = seed
        self._shuffle = shuffle

    def epoch(self, epoch: int) -> Sequence[int]:
        """The prompts' indices in the order of ``epoch`` (counted from 0)."""
        if not self._shuffle:
            return range(self.num_prompts)
        generator = random.Random(_digest(f"order:{self._seed}:{epoch}"))
        keys = [generator.random() for _ in range(self.num_prompts)]
        return sorted(range(self.num_prompts), key=keys.__getitem__)
