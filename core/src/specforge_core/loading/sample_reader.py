# SPDX-License-Identifier: Apache-2.0
"""Reads one sample's features, and refuses a ref or tokens that are not what training asked for.

A ref can come from whoever writes into a channel and a file from whoever writes into a store. What training asked for
it knows itself: the prompt, the layers, their sizes. So a ref that claims terabytes is refused before anything is
allocated for it, and tokens or a loss mask that are not the prompt's are never trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from specforge_core.contracts import (
    INPUT_IDS,
    LOSS_MASK,
    CaptureRequest,
    FeatureCorrupt,
    FeatureStore,
    Prompt,
    Sample,
    SampleRef,
    locate,
)

_HINT = "find out who else can write into the run's store and channel; then capture the sample again"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleReader:
    """A store, and what the samples in it must consist of.

    :param request: what was captured.
    :param hidden_size: of the target.
    """

    store: FeatureStore
    request: CaptureRequest
    hidden_size: int

    def read(self, ref: SampleRef, prompt: Prompt) -> Sample:
        """The features of ``prompt`` that ``ref`` names.

        :raises FeatureCorrupt: the ref or what is stored is not what was asked for.
        :raises StoreError: what ``FeatureStore.get`` raises.
        """
        expected = {spec.name: spec for spec in self.request.specs(prompt.num_tokens, self.hidden_size)}
        told = {spec.name: spec for spec in ref.features}
        named = (ref.prompt_id, ref.num_tokens) == (prompt.prompt_id, prompt.num_tokens)
        if not named or told != expected or len(ref.features) != len(expected):
            raise FeatureCorrupt("its ref describes something else than was asked for", where=locate(ref), hint=_HINT)
        sample = self.store.get(ref)
        _check_tokens(sample, ref, prompt)
        return sample


def _check_tokens(sample: Sample, ref: SampleRef, prompt: Prompt) -> None:
    """:raises FeatureCorrupt: the token ids or the loss mask are not the prompt's."""
    for name, expected in ((INPUT_IDS, prompt.input_ids), (LOSS_MASK, prompt.loss_mask)):
        if sample.features[name].tolist() != list(expected):
            raise FeatureCorrupt(f"its {name} are not the prompt's", where=locate(ref), hint=_HINT)
