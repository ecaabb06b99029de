# SPDX-License-Identifier: Apache-2.0
"""What both halves agree on about batches: which prompts they are, how many bytes they bring, and whose they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from specforge_core.contracts import CaptureRequest, DataError, Prompt, TargetInfo
from specforge_core.loading.order import PromptOrder
from specforge_core.loading.windows import WindowPlan
from specforge_core.run.batches import RunBatches
from specforge_core.testing.tiny_plugin import TinyTargetConfig
from specforge_core.testing.tiny_target import TinyTarget

REQUEST = CaptureRequest((1, 3), "post")


class Prompts(list[Prompt]):
    """What a prompt set offers, in memory."""

    def __init__(self, prefix: str, count: int, *, fingerprint: str) -> None:
        super().__init__(
            Prompt(f"{prefix}{index}", list(range(3 + index % 4)), [1] * (3 + index % 4)) for index in range(count)
        )
        self.fingerprint = fingerprint

    def prompt_id(self, index: int) -> str:
        return self[index].prompt_id

    def num_tokens_of(self, index: int) -> int:
        return self[index].num_tokens


def batches(
    *,
    info: TargetInfo | None = None,
    request: CaptureRequest = REQUEST,
    prompts: str = "corpus",
    offline: bool = False,
    size: int = 3,
) -> RunBatches:
    info = info or TinyTargetConfig().describe()
    plan: Any = SimpleNamespace(
        config=SimpleNamespace(capture=SimpleNamespace(batch_size=size)),
        info=info,
        request=request,
        feature_reuse=offline,
        bytes_per_token=sum(spec.nbytes for spec in request.specs(1, info.hidden_size)),
    )
    sets: dict[str, Any] = {
        "train": Prompts("p", 8, fingerprint=prompts),
        "eval": Prompts("h", 4, fingerprint="held out"),
    }
    return RunBatches(plan, prompts=sets.__getitem__, order=lambda: PromptOrder(8, seed=1, shuffle=True))


def windows(epochs: int = 2) -> WindowPlan:
    return WindowPlan(num_prompts=8, global_batch_size=4, micro_batch_size=2, epochs=epochs)


def names(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.prompt_id for prompt in prompts]


def test_a_capture_process_finds_the_prompts_that_the_train_role_planned() -> None:
    planned = list(batches().planned(windows(), 0))
    capture = batches()
    for item in planned:
        found = names(capture.prompts_of(item.batch))
        assert len(found) == item.batch.count
        for offset, (sample_id, _) in item.samples.items():
            assert sample_id == f"{found[offset]}.e{item.batch.epoch}"
    order = PromptOrder(8, seed=1, shuffle=True)
    assert [sample_id for item in planned for sample_id, _ in item.samples.values()] == [
        f"p{index}.e{epoch}" for epoch in range(2) for index in order.epoch(epoch)
    ]


def test_bytes_are_counted_exactly() -> None:
    ours, target = batches(), TinyTarget()
    for item in ours.planned(windows(1), 0):
        samples = target.capture(ours.prompts_of(item.batch), REQUEST, 0)
        for sample, (_, nbytes) in zip(samples, item.samples.values(), strict=True):
            assert nbytes == sum(spec.nbytes for spec in sample.specs())


def test_offline_every_prompt_is_planned_once_in_its_own_order() -> None:
    ours = batches(offline=True)
    planned = list(ours.planned_once("train"))
    assert [sample_id for item in planned for sample_id, _ in item.samples.values()] == [f"p{i}.e0" for i in range(8)]
    assert [name for item in planned for name in names(ours.prompts_of(item.batch))] == [f"p{i}" for i in range(8)]


@pytest.mark.parametrize("offline", [True, False])
def test_held_out_prompts_are_planned_once_whatever_the_topology(offline: bool) -> None:
    ours = batches(offline=offline)
    planned = list(ours.planned_once("eval"))
    assert [item.batch.split for item in planned] == ["eval", "eval"]
    assert [key for item in planned for key, _ in item.samples.values()] == [f"h{i}.held-out" for i in range(4)]
    assert [name for item in planned for name in names(ours.prompts_of(item.batch))] == [f"h{i}" for i in range(4)]


INFO = TinyTargetConfig().describe()
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "target": ({"info": replace(INFO, num_layers=INFO.num_layers + 1)}, "another target$"),
    "target's name": ({"info": replace(INFO, name_or_path="models/other")}, "another target$"),
    "request": ({"request": CaptureRequest((1, 2), "post")}, "set of captured features$"),
    "prompts": ({"prompts": "another corpus"}, "another set of prompts$"),
    "two parts": ({"prompts": "another", "request": CaptureRequest((1,))}, "features and another set of prompts$"),
}


@pytest.mark.parametrize("case", list(OTHERS))
def test_a_capture_process_of_another_run_names_what_differs(case: str) -> None:
    changes, said = OTHERS[case]
    [first, *_] = batches().planned(windows(), 0)
    with pytest.raises(DataError) as caught:
        batches(**changes).prompts_of(first.batch)
    assert caught.value.where == "batch train.0.0+3"
    assert "same run file, data and target" in caught.value.hint

    assert re.search(said, caught.value.message), caught.value.message


def test_where_a_machine_keeps_the_target_does_not_matter() -> None:
    one = batches(info=replace(INFO, name_or_path="models/qwen"))
    other = batches(info=replace(INFO, name_or_path="fast/disk/qwen"))
    [first, *_] = one.planned(windows(), 0)
    assert len(other.prompts_of(first.batch)) == 3


def test_a_batch_that_says_nothing_of_its_run_is_refused() -> None:
    [first, *_] = batches().planned(windows(), 0)
    with pytest.raises(DataError, match="planned with another"):
        batches().prompts_of(replace(first.batch, fingerprint=""))
