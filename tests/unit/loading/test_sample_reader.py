# SPDX-License-Identifier: Apache-2.0
"""What training asked for it knows itself: a ref or tokens of something else are refused before they cost anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from specforge_core.contracts import CaptureRequest, FeatureCorrupt, FeatureSpec, Prompt, Sample, SampleRef
from specforge_core.loading.sample_reader import SampleReader
from toy_run import DictStore

HIDDEN = 4
PROMPT = Prompt("p1", [5, 6, 7], [0, 1, 1])
REQUEST = CaptureRequest(aux_layer_ids=(0, 2), last_hidden_norm="post")


class CountingStore(DictStore):
    reads = 0

    def get(self, ref: SampleRef) -> Sample:
        self.reads += 1
        return super().get(ref)


def captured(*, input_ids: list[int] | None = None, loss_mask: list[int] | None = None) -> Sample:
    features = {
        "input_ids": torch.tensor(input_ids or PROMPT.input_ids),
        "loss_mask": torch.tensor(loss_mask or PROMPT.loss_mask, dtype=torch.bool),
        "aux_hidden_states": torch.ones(3, 2, HIDDEN),
        "last_hidden_states": torch.ones(3, HIDDEN),
    }
    return Sample("p1", 0, features, "post")


@pytest.fixture
def reader() -> SampleReader:
    return SampleReader(store=CountingStore(), request=REQUEST, hidden_size=HIDDEN)


def test_what_was_asked_for_is_read(reader: SampleReader) -> None:
    ref = reader.store.put("p1.e0", captured())
    assert reader.read(ref, PROMPT).num_tokens == 3


def of_spec(index: int, **changes: object) -> Callable[[SampleRef], SampleRef]:
    def change(ref: SampleRef) -> SampleRef:
        specs = list(ref.features)
        specs[index] = replace(specs[index], **changes)
        return replace(ref, features=tuple(specs))

    return change


CLAIMS: dict[str, Callable[[SampleRef], SampleRef]] = {
    "terabytes": of_spec(0, shape=(3, 2, 10**12)),
    "more tokens": lambda ref: replace(ref, num_tokens=10**15),
    "another dtype": of_spec(0, dtype="float64"),
    "another norm": of_spec(2, norm="pre"),
    "another prompt": lambda ref: replace(ref, prompt_id="p2"),
    "a feature more": lambda ref: replace(ref, features=(*ref.features, FeatureSpec("x", (10**9,), "int64"))),
    "a feature less": lambda ref: replace(ref, features=ref.features[:-1]),
    "a feature twice": lambda ref: replace(ref, features=(*ref.features, ref.features[0])),
}


@pytest.mark.parametrize("claim", list(CLAIMS))
def test_a_ref_that_claims_something_else_is_refused_before_anything_is_read(reader: SampleReader, claim: str) -> None:
    ref = replace(CLAIMS[claim](reader.store.put("p1.e0", captured())), origin="refs/stranger.refs, offset 7")
    with pytest.raises(FeatureCorrupt, match=r"sample p1\.e0 \(refs/stranger\.refs, offset 7\): its ref describes"):
        reader.read(ref, PROMPT)
    assert reader.store.reads == 0


def test_tokens_and_masks_of_somebody_else_are_refused(reader: SampleReader) -> None:
    for planted, said in ((captured(input_ids=[5, 6, 8]), "input_ids"), (captured(loss_mask=[1, 1, 1]), "loss_mask")):
        ref = reader.store.put("p1.e0", planted)
        with pytest.raises(FeatureCorrupt, match=f"its {said} are not the prompt's"):
            reader.read(ref, PROMPT)
