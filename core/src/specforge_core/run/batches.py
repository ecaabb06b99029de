# SPDX-License-Identifier: Apache-2.0
"""What both halves of a run must agree on about capture batches: which prompts, in which order, of which target.

The train role plans batches from it; a capture process, often on another machine, finds the prompts of a batch it took
and first compares the batch's fingerprint with its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import PurePath
from typing import Any

from specforge_core.config.plan import Plan
from specforge_core.contracts import CaptureBatch, Prompt, RunMismatch, Split, held_out_sample_id, sample_id
from specforge_core.loading.demand import PlannedBatch
from specforge_core.loading.order import PromptOrder
from specforge_core.loading.planned import cut_batches, plan_epochs
from specforge_core.loading.windows import WindowPlan
from specforge_core.prompts.prompt_set import PromptSet
from specforge_core.run.feature_manifest import describe_features
from specforge_core.run.ordered_prompts import OrderedPrompts

_PARTS = {"target": "target", "request": "set of captured features", "prompts": "set of prompts"}


class RunBatches:
    """The batches of one run.

    :param prompts: the prepared prompts of a split.
    :param order: in which order each epoch walks through the training prompts; offline there is but one walk, in
        the order of the prompts.
    """

    def __init__(self, plan: Plan, *, prompts: Callable[[Split], PromptSet], order: Callable[[], PromptOrder]) -> None:
        self._plan = plan
        self._prompts = prompts
        self._order = order
        self._epoch_order = lru_cache(maxsize=2)(lambda epoch: order().epoch(epoch))
        self._fingerprints: dict[Split, str] = {}

    def fingerprint(self, split: Split) -> str:
        """Digests of target, capture request and prompts."""
        if split not in self._fingerprints:
            manifest = describe_features(self._plan.info, self._plan.request, prompts=self._prompts(split).fingerprint)
            self._fingerprints[split] = _fingerprint(manifest)
        return self._fingerprints[split]

    def planned(self, windows: WindowPlan, start: int) -> Iterator[PlannedBatch]:
        """Online: the batches that windows ``start`` and later need, each epoch in its order."""
        return plan_epochs(
            windows,
            self._order(),
            self._describe_epoch,
            size=self._plan.config.capture.batch_size,
            fingerprint=self.fingerprint("train"),
            start=start,
        )

    def planned_once(self, split: Split) -> Iterator[PlannedBatch]:
        """Every prompt of a split once, in order: held-out prompts, and training prompts offline."""
        count = len(self._prompts(split))
        return cut_batches(
            range(count),
            self._describe_held_out if split == "eval" else self._describe_epoch(0),
            batch=(split, 0, self.fingerprint(split)),
            size=self._plan.config.capture.batch_size,
            places=range(count),
        )

    def prompts_of(self, batch: CaptureBatch) -> Sequence[Prompt]:
        """The prompts to capture together.

        :raises RunMismatch: this process would capture something else than was asked for; what differs is named.
        """
        ours = self.fingerprint(batch.split)
        if ours != batch.fingerprint:
            asked = batch.fingerprint.split("-")
            parts = zip(_PARTS.values(), ours.split("-"), asked, strict=False)
            differ = [part for part, own, theirs in parts if own != theirs]
            raise RunMismatch(
                f"what is wanted was planned with another {' and another '.join(differ) or 'version of specforge'}",
                where=f"batch {batch.key}",
                hint="give every process of a run the same run file, data and target",
            )
        prompts = self._prompts(batch.split)
        if batch.split == "train" and not self._plan.feature_reuse:
            return OrderedPrompts(prompts, self._epoch_order(batch.epoch))[batch.first : batch.first + batch.count]
        return prompts[batch.first : batch.first + batch.count]

    def _describe_epoch(self, epoch: int) -> Callable[[int], tuple[str, int]]:
        prompts = self._prompts("train")
        return lambda index: (sample_id(prompts.prompt_id(index), epoch), self._bytes(prompts, index))

    def _describe_held_out(self, index: int) -> tuple[str, int]:
        prompts = self._prompts("eval")
        return held_out_sample_id(prompts.prompt_id(index)), self._bytes(prompts, index)

    def _bytes(self, prompts: PromptSet, index: int) -> int:
        return self._plan.bytes_per_token * prompts.num_tokens_of(index)


def _fingerprint(manifest: Mapping[str, Any]) -> str:
    """One digest per part. A target is known by its name, not by where a machine keeps it."""
    target = dict(manifest["target"])
    target["name_or_path"] = PurePath(target["name_or_path"]).name
    parts = {**manifest, "target": target}
    digests = [hashlib.blake2b(json.dumps(parts[key], sort_keys=True).encode(), digest_size=5) for key in _PARTS]
    return "-".join(digest.hexdigest() for digest in digests)
