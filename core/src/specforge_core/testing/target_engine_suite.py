# SPDX-License-Identifier: Apache-2.0
"""What every target engine must do. Subclass, provide ``make_engine``, and pytest runs the contract::

    class TestMyEngine(TargetEngineSuite):
        capabilities = MY_SPEC.capabilities

        def make_engine(self):
            return MyEngine(MyConfig(name="mine", path=a_small_model()))

It knows no model, so it holds an engine to its own words: the last layer's output is ``last_hidden_states`` before the
norm, a prefix has the features of the whole, a sequence alone those it has in a batch, the head makes the decoder's
logits of ``last_hidden_states`` after the norm. A target needs three layers or more and its own random weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from specforge_core.contracts import (
    AUX_HIDDEN_STATES,
    EMBED_TOKENS,
    FINAL_NORM,
    INPUT_IDS,
    LAST_HIDDEN_STATES,
    LM_HEAD,
    LOSS_MASK,
    CaptureRequest,
    EngineCapabilities,
    Prompt,
    Sample,
    TargetEngine,
    TargetError,
)
from specforge_core.testing.conformance import ContractSuite

LENGTHS = (9, 1, 14)


class TargetEngineSuite(ContractSuite):
    """The contract of :class:`specforge_core.contracts.TargetEngine`."""

    capabilities = EngineCapabilities(decodes=True)
    """What the engine's descriptor declares; what is not declared is not tested."""

    tolerance = 2e-4
    """Largest difference allowed where a sum may be taken in another order."""

    @abstractmethod
    def make_engine(self) -> TargetEngine:
        """A new engine for a small target."""

    @pytest.fixture
    def engine(self) -> Iterator[TargetEngine]:
        engine = self.make_engine()
        yield engine
        engine.close()

    def request_for(self, engine: TargetEngine, *layers: int, dtype: str = "float32") -> CaptureRequest:
        """Those layers where the engine captures layers, and the last state after (or else before) the norm."""
        norm = "post" if "post" in self.capabilities.norms else self.capabilities.norms[0]
        return CaptureRequest(layers if self.capabilities.aux_layers else (), norm, dtype)

    def close_to(self, found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, atol=self.tolerance, rtol=self.tolerance)

    def test_info_describes_a_decoder(self, engine: TargetEngine) -> None:
        info = engine.info
        assert min(info.num_layers, info.hidden_size, info.vocab_size, info.num_attention_heads, info.head_dim) > 0
        assert info.num_layers >= 3, "this suite needs three layers to tell them apart"

    def test_samples_are_what_was_asked_for(self, engine: TargetEngine) -> None:
        request, prompts = self.request_for(engine, 2, 0), make_prompts(engine)
        samples = list(engine.capture(prompts, request, epoch=3))
        assert [sample.sample_id for sample in samples] == [f"{prompt.prompt_id}.e3" for prompt in prompts]
        for prompt, sample in zip(prompts, samples, strict=True):
            assert set(sample.specs()) == set(request.specs(prompt.num_tokens, engine.info.hidden_size))
            assert sample.features[INPUT_IDS].tolist() == list(prompt.input_ids)
            assert sample.features[LOSS_MASK].tolist() == [bool(item) for item in prompt.loss_mask]
            assert all(tensor.device.type == "cpu" for tensor in sample.features.values())
            for name in set(request.features) - {INPUT_IDS, LOSS_MASK}:
                assert torch.isfinite(sample.features[name]).all()

    def test_no_prompts_give_no_samples(self, engine: TargetEngine) -> None:
        assert list(engine.capture([], self.request_for(engine, 0), 0)) == []

    def test_the_same_batch_gives_the_same_bits(self, engine: TargetEngine) -> None:
        request, prompts = self.request_for(engine, 0, 2), make_prompts(engine)
        once, again = capture(engine, prompts, request), capture(engine, prompts, request)
        for first, second in zip(once, again, strict=True):
            assert all(torch.equal(first.features[name], second.features[name]) for name in request.features)

    def test_a_sequence_alone_is_what_it_is_in_a_batch(self, engine: TargetEngine) -> None:
        request, prompts = self.request_for(engine, 0, 2), make_prompts(engine)
        for prompt, batched in zip(prompts, capture(engine, prompts, request), strict=True):
            [alone] = capture(engine, [prompt], request)
            for name in set(request.features) - {INPUT_IDS, LOSS_MASK}:
                self.close_to(batched.features[name], alone.features[name])

    def test_no_position_sees_what_follows(self, engine: TargetEngine) -> None:
        request, prompt = self.request_for(engine, 0, 2), make_prompts(engine)[2]
        half = Prompt("half", prompt.input_ids[:7], prompt.loss_mask[:7])
        [whole], [prefix] = capture(engine, [prompt], request), capture(engine, [half], request)
        for name in set(request.features) - {INPUT_IDS, LOSS_MASK}:
            self.close_to(prefix.features[name], whole.features[name][:7])

    def test_layers_come_in_the_order_asked_for(self, engine: TargetEngine) -> None:
        self.need_layers()
        prompts, layers = make_prompts(engine)[:1], tuple(range(engine.info.num_layers))
        [every] = capture(engine, prompts, CaptureRequest(layers))
        for order in ((2, 0), (0, 2), (1,)):
            [some] = capture(engine, prompts, CaptureRequest(order))
            self.close_to(some.features[AUX_HIDDEN_STATES], every.features[AUX_HIDDEN_STATES][:, list(order)])
        for layer in layers[1:]:
            states = every.features[AUX_HIDDEN_STATES]
            assert not torch.allclose(states[:, layer], states[:, layer - 1]), "two layers put out the same"

    def test_layer_ids_are_zero_based_and_name_outputs(self, engine: TargetEngine) -> None:
        self.need_layers()
        if "pre" not in self.capabilities.norms:
            pytest.skip("this engine cannot capture the last state before the norm")
        last = engine.info.num_layers - 1
        [sample] = capture(engine, make_prompts(engine)[:1], CaptureRequest((last, 0), "pre"))
        self.close_to(sample.features[LAST_HIDDEN_STATES], sample.features[AUX_HIDDEN_STATES][:, 0])

    def test_post_is_the_norm_of_pre(self, engine: TargetEngine) -> None:
        if not {"pre", "post"} <= set(self.capabilities.norms):
            pytest.skip("this engine captures one norm only")
        prompts = make_prompts(engine)[:1]
        [pre] = capture(engine, prompts, CaptureRequest((), "pre"))
        [post] = capture(engine, prompts, CaptureRequest((), "post"))
        hidden = pre.features[LAST_HIDDEN_STATES]
        weight = engine.frozen_weights([FINAL_NORM])[FINAL_NORM].float()
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + engine.info.rms_norm_eps)
        self.close_to(post.features[LAST_HIDDEN_STATES], hidden * scale * weight)

    def test_captured_tensors_belong_to_the_caller(self, engine: TargetEngine) -> None:
        request, prompts = self.request_for(engine, 0, 2), make_prompts(engine)
        samples, untouched = capture(engine, prompts, request), capture(engine, prompts, request)
        for name in request.features:
            assert samples[0].features[name].untyped_storage().nbytes() == samples[0].features[name].nbytes
            samples[0].features[name].zero_()
        for touched, expected in zip(samples[1:], untouched[1:], strict=True):
            assert all(torch.equal(touched.features[name], expected.features[name]) for name in request.features)
        assert not any(tensor.requires_grad for tensor in untouched[0].features.values())

    def test_other_dtypes_are_the_same_numbers_rounded(self, engine: TargetEngine) -> None:
        prompts = make_prompts(engine)[:1]
        [exact] = capture(engine, prompts, self.request_for(engine, 1))
        for dtype in self.capabilities.dtypes:
            [rounded] = capture(engine, prompts, self.request_for(engine, 1, dtype=dtype))
            tensor = rounded.features[LAST_HIDDEN_STATES]
            assert str(tensor.dtype) == f"torch.{dtype}"
            torch.testing.assert_close(tensor.float(), exact.features[LAST_HIDDEN_STATES], atol=0.02, rtol=0.02)

    def test_a_layer_that_is_not_there_is_an_error(self, engine: TargetEngine) -> None:
        self.need_layers()
        for layer in (engine.info.num_layers, -1):
            with pytest.raises(TargetError):
                list(engine.capture(make_prompts(engine)[:1], CaptureRequest((layer,)), 0))

    def test_frozen_weights_are_copies_of_the_right_shape(self, engine: TargetEngine) -> None:
        info = engine.info
        weights = engine.frozen_weights([LM_HEAD, EMBED_TOKENS])
        assert set(weights) == {LM_HEAD, EMBED_TOKENS}
        for tensor in weights.values():
            assert tuple(tensor.shape) == (info.vocab_size, info.hidden_size)
            assert (str(tensor.dtype), tensor.device.type) == (f"torch.{info.dtype}", "cpu")
        before = weights[EMBED_TOKENS].clone()
        weights[LM_HEAD].zero_()
        assert torch.equal(weights[EMBED_TOKENS], before)
        weights[EMBED_TOKENS].zero_()
        assert torch.equal(engine.frozen_weights([EMBED_TOKENS])[EMBED_TOKENS], before)
        with pytest.raises(TargetError):
            engine.frozen_weights(["no_such.weight"])

    def test_the_decoder_is_the_capture_one_step_at_a_time(self, engine: TargetEngine) -> None:
        self.need_decoder()
        request, prompt = self.request_for(engine, 2, 0), make_prompts(engine)[2]
        [sample] = capture(engine, [prompt], request)
        token_ids, decoder = torch.tensor(prompt.input_ids), engine.decoder(request)
        steps = [decoder.forward(token_ids[:6]), decoder.forward(token_ids[6:7]), decoder.forward(token_ids[7:])]
        for name in set(request.features) - {INPUT_IDS, LOSS_MASK}:
            self.close_to(torch.cat([step.features[name] for step in steps]).float(), sample.features[name].float())

    def test_logits_are_the_head_of_the_last_state_after_the_norm(self, engine: TargetEngine) -> None:
        self.need_decoder()
        token_ids = torch.tensor(make_prompts(engine)[0].input_ids)
        step = engine.decoder(CaptureRequest((), "post")).forward(token_ids)
        head = engine.frozen_weights([LM_HEAD])[LM_HEAD].float()
        assert tuple(step.logits.shape) == (len(token_ids), engine.info.vocab_size)
        self.close_to(step.logits.float(), step.features[LAST_HIDDEN_STATES].float() @ head.T)

    def test_a_truncated_decoder_has_forgotten(self, engine: TargetEngine) -> None:
        self.need_decoder()
        request, token_ids = self.request_for(engine, 0), torch.tensor(make_prompts(engine)[2].input_ids)
        straight, winding = engine.decoder(request), engine.decoder(request)
        straight.forward(token_ids[:5])
        winding.forward(token_ids[:5])
        winding.forward(token_ids.flip(0)[:4])
        winding.truncate(7)
        winding.truncate(5)
        found, expected = winding.forward(token_ids[5:]), straight.forward(token_ids[5:])
        self.close_to(found.logits, expected.logits)
        winding.truncate(0)
        self.close_to(winding.forward(token_ids[:5]).logits, engine.decoder(request).forward(token_ids[:5]).logits)

    def test_two_decoders_share_no_cache(self, engine: TargetEngine) -> None:
        self.need_decoder()
        request, token_ids = self.request_for(engine, 0), torch.tensor(make_prompts(engine)[2].input_ids)
        one, other = engine.decoder(request), engine.decoder(request)
        one.forward(token_ids[:6])
        other.forward(token_ids.flip(0)[:3])
        expected = engine.decoder(request).forward(token_ids).logits[6:]
        self.close_to(one.forward(token_ids[6:]).logits, expected)

    def test_health_returns_and_close_is_idempotent(self) -> None:
        engine = self.make_engine()
        engine.health()
        engine.close()
        engine.close()

    def need_layers(self) -> None:
        """Skip what an engine that declares no layers cannot do."""
        if not self.capabilities.aux_layers:
            pytest.skip("this engine captures the last state only")

    def need_decoder(self) -> None:
        """Skip what an engine that declares no decoding cannot do."""
        if not self.capabilities.decodes:
            pytest.skip("this engine does not decode in this process")


def make_prompts(engine: TargetEngine) -> list[Prompt]:
    """Prompts of different lengths, one of a single token, with ids from the whole vocabulary."""
    generator = torch.Generator().manual_seed(11)
    prompts = []
    for index, length in enumerate(LENGTHS):
        token_ids = torch.randint(0, engine.info.vocab_size, (length,), generator=generator).tolist()
        prompts.append(Prompt(f"prompt-{index}", token_ids, [int(place % 3 == 0) for place in range(length)]))
    return prompts


def capture(engine: TargetEngine, prompts: Sequence[Prompt], request: CaptureRequest) -> list[Sample]:
    """One batch, captured whole."""
    return list(engine.capture(prompts, request, 0))
