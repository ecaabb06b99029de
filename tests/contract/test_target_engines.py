# SPDX-License-Identifier: Apache-2.0
"""The target engine contract on the tiny target and on hf, and on broken engines that it must reject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from specforge_core.contracts import CaptureRequest, EngineCapabilities, Prompt, TargetEngine, TargetStep
from specforge_core.testing.conformance import assert_rejected
from specforge_core.testing.target_engine_suite import TargetEngineSuite
from specforge_core.testing.tiny_plugin import specforge_target_engines
from specforge_core.testing.tiny_target import TinyDecoder, TinyTarget
from specforge_hf_target.config import HfTargetConfig
from specforge_hf_target.engine import HfTargetEngine
from specforge_hf_target.plugin import specforge_target_engines as hf_engines


class TestTinyTarget(TargetEngineSuite):
    capabilities: EngineCapabilities = specforge_target_engines()[0].capabilities

    def make_engine(self) -> TargetEngine:
        return TinyTarget()


class TestHfTarget(TargetEngineSuite):
    capabilities: EngineCapabilities = hf_engines()[0].capabilities

    @pytest.fixture(autouse=True)
    def _model(self, tiny_model) -> None:
        self.path: Path = tiny_model.path

    def make_engine(self) -> TargetEngine:
        return HfTargetEngine(HfTargetConfig(name="hf", path=str(self.path)))


class SortedLayers(TinyTarget):
    """Hands out layers in the model's order."""

    def capture(self, prompts, request, epoch):
        return super().capture(prompts, replace(request, aux_layer_ids=tuple(sorted(request.aux_layer_ids))), epoch)


class InputsOfLayers(TinyTarget):
    """Takes layer ids for what enters the layer."""

    def capture(self, prompts, request, epoch):
        shifted = tuple(max(layer - 1, 0) for layer in request.aux_layer_ids)
        return super().capture(prompts, replace(request, aux_layer_ids=shifted), epoch)


class Unnormed(TinyTarget):
    """Says post and gives pre."""

    def pick(self, outputs, last_BTH, request):
        return super().pick(outputs, outputs[-1], request)


class Views(TinyTarget):
    """Hands out rows of the batch."""

    def capture(self, prompts, request, epoch):
        samples = list(super().capture(prompts, request, epoch))
        for name in request.features:
            rows = torch.cat([sample.features[name] for sample in samples])
            for sample, view in zip(samples, rows.split([s.num_tokens for s in samples]), strict=True):
                sample.features[name] = view
        return iter(samples)


class Restless(TinyTarget):
    """Never gives the same bits twice."""

    def capture(self, prompts, request, epoch):
        for sample in super().capture(prompts, request, epoch):
            sample.features["last_hidden_states"] += 1e-6 * torch.randn(sample.num_tokens, 1)
            yield sample


class Sorting(TinyTarget):
    """Returns samples by length, as a scheduler might."""

    def capture(self, prompts: Sequence[Prompt], request: CaptureRequest, epoch: int):
        return super().capture(sorted(prompts, key=lambda prompt: prompt.num_tokens), request, epoch)


class PaddedLeft(TinyTarget):
    """Lets padding in front of a sequence be seen by it."""

    def capture(self, prompts, request, epoch):
        longest = max((prompt.num_tokens for prompt in prompts), default=0)
        for prompt in prompts:
            pad = [0] * (longest - prompt.num_tokens)
            padded = replace(prompt, input_ids=pad + list(prompt.input_ids), loss_mask=pad + list(prompt.loss_mask))
            for sample in super().capture([padded], request, epoch):
                features = {name: tensor[len(pad) :].clone() for name, tensor in sample.features.items()}
                yield replace(sample, features=features)


class SeesTheFuture(TinyTarget):
    """Mixes the whole sequence into every position."""

    def pick(self, outputs, last_BTH, request):
        return super().pick([o + o.mean(1, keepdim=True) for o in outputs], last_BTH, request)


class AlwaysFloat32(TinyTarget):
    """Ignores the dtype."""

    def pick(self, outputs, last_BTH, request):
        return super().pick(outputs, last_BTH, replace(request, dtype="float32"))


class Unchecked(TinyTarget):
    """Wraps around where a layer does not exist."""

    def _check(self, request: CaptureRequest) -> None:
        pass

    def pick(self, outputs, last_BTH, request):
        layers = tuple(layer % len(outputs) for layer in request.aux_layer_ids)
        return super().pick(outputs, last_BTH, replace(request, aux_layer_ids=layers))


class SharesWeights(TinyTarget):
    """Hands out the weights it computes with."""

    def frozen_weights(self, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        super().frozen_weights(names)
        return {name: self._weights[name] for name in names}


class Forgetful(TinyTarget):
    """Its decoder cannot forget."""

    def decoder(self, request: CaptureRequest) -> TinyDecoder:
        decoder = super().decoder(request)
        decoder.truncate = lambda length: None
        return decoder


class OneCache(TinyTarget):
    """All its decoders are one."""

    def decoder(self, request: CaptureRequest) -> TinyDecoder:
        if not hasattr(self, "_decoder"):
            self._decoder = super().decoder(request)
        return self._decoder


class OtherHead(TinyTarget):
    """Its logits are not those of the head it hands out."""

    def logits(self, last_nH):
        return 1.1 * super().logits(last_nH)


class SkipsFeatures(TinyTarget):
    """Its decoder's features lag one step behind."""

    def decoder(self, request: CaptureRequest):
        decoder = super().decoder(request)
        forward = decoder.forward

        def late(token_ids):
            step = forward(token_ids)
            return TargetStep(step.logits, {name: t.roll(1, dims=0) for name, t in step.features.items()})

        decoder.forward = late
        return decoder


BROKEN = [
    (SortedLayers, "test_layers_come_in_the_order_asked_for"),
    (InputsOfLayers, "test_layer_ids_are_zero_based_and_name_outputs"),
    (Unnormed, "test_post_is_the_norm_of_pre"),
    (Views, "test_captured_tensors_belong_to_the_caller"),
    (Restless, "test_the_same_batch_gives_the_same_bits"),
    (Sorting, "test_samples_are_what_was_asked_for"),
    (PaddedLeft, "test_a_sequence_alone_is_what_it_is_in_a_batch"),
    (SeesTheFuture, "test_no_position_sees_what_follows"),
    (AlwaysFloat32, "test_other_dtypes_are_the_same_numbers_rounded"),
    (Unchecked, "test_a_layer_that_is_not_there_is_an_error"),
    (SharesWeights, "test_frozen_weights_are_copies_of_the_right_shape"),
    (Forgetful, "test_a_truncated_decoder_has_forgotten"),
    (OneCache, "test_two_decoders_share_no_cache"),
    (OtherHead, "test_logits_are_the_head_of_the_last_state_after_the_norm"),
    (SkipsFeatures, "test_the_decoder_is_the_capture_one_step_at_a_time"),
]


@pytest.mark.parametrize(("broken", "by"), BROKEN, ids=lambda item: getattr(item, "__name__", ""))
def test_broken_engines_are_rejected(broken: type[TinyTarget], by: str) -> None:
    class Suite(TargetEngineSuite):
        def make_engine(self) -> TargetEngine:
            return broken()

    assert_rejected(Suite, by=by)


def test_the_tiny_target_is_offered_as_a_plugin() -> None:
    from specforge_core.hooks.descriptors import resolve

    [spec] = specforge_target_engines()
    section = spec.config(seed=3, hidden_size=16)
    engine = resolve(spec.factory)(section)
    assert engine.info == section.describe()
    assert resolve(spec.tokenizer)(section).encode("é<|end|>").offsets == [(0, 1), (0, 1), (1, 8)]
    assert not torch.equal(
        engine.frozen_weights(["norm.weight"])["norm.weight"],
        TinyTarget(spec.config(seed=4, hidden_size=16)).frozen_weights(["norm.weight"])["norm.weight"],
    )
