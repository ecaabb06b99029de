# SPDX-License-Identifier: Apache-2.0
"""The contract suite of strategies. A plugin's tests subclass it and say what to load::

    class TestMyStrategy(StrategySuite):
        plugin = "my_distribution.plugin"
        name = "mine"
        settings = {"block_size": 4}

Everything runs on a synthetic target of tiny shapes; no transformers, no network, seconds on one core.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from specforge_core.contracts import (
    EMBED_TOKENS,
    LM_HEAD,
    Batch,
    Drafter,
    ExportError,
    Ratio,
    Sample,
    StepContext,
    Strategy,
    sum_ratios,
)
from specforge_core.hooks.descriptors import StrategySpec, resolve
from specforge_core.testing.conformance import ContractSuite
from specforge_core.testing.synthetic import SyntheticTarget

_LENGTHS = (9, 24, 16, 13)
_CUTS = ([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 1], [2, 3]], [[2, 0], [3, 1]])


@dataclass(frozen=True)
class WindowResult:
    """What one optimizer window gives, before the optimizer."""

    loss: float
    grads: Mapping[str, Tensor]
    metrics: Mapping[str, Ratio]


class StrategySuite(ContractSuite):
    """Set ``plugin``, ``name`` and, where defaults do not suit a 12-layer target of hidden size 32, ``settings``."""

    plugin: ClassVar[str]
    name: ClassVar[str]
    settings: ClassVar[Mapping[str, Any]] = {}
    target: ClassVar[SyntheticTarget] = SyntheticTarget()

    def spec(self) -> StrategySpec:
        """The descriptor that the plugin's own hook gives."""
        offered: Sequence[StrategySpec] = importlib.import_module(self.plugin).specforge_strategies()
        (spec,) = (spec for spec in offered if spec.name == self.name)
        return spec

    def make_strategy(self) -> Strategy:
        """A strategy as a run would construct it."""
        spec = self.spec()
        strategy: Strategy = resolve(spec.factory)(spec.config.model_validate({"name": self.name, **self.settings}))
        return strategy

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> None:
        torch.set_num_threads(1)

    def _draft(self, strategy: Strategy, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return strategy.build_draft(self.target)

    def _lively_draft(self, strategy: Strategy) -> nn.Module:
        """Weights large enough for every input to sway the guesses; freshly initialised ones hardly do."""
        draft = self._draft(strategy)
        with torch.no_grad():
            for parameter in draft.parameters():
                if parameter.dim() > 1 and parameter.requires_grad:
                    parameter.mul_(10)
        return draft

    def _samples(self, strategy: Strategy) -> list[Sample]:
        request = strategy.capture_request(self.target.info)
        return [self.target.sample(f"p{i}", num_tokens=n, request=request) for i, n in enumerate(_LENGTHS)]

    def _window(
        self, strategy: Strategy, draft: nn.Module, batches: Sequence[Batch], *, run: Sequence[Batch] | None = None
    ) -> WindowResult:
        """As the trainer does it: the whole window's denominators first, then its micro-batches (or ``run``)."""
        denominators: dict[str, float] = {}
        for batch in batches:
            for name, value in batch.denominators.items():
                denominators[name] = denominators.get(name, 0.0) + value
        context = StepContext(step=3, total_steps=10, denominators=denominators)
        if strategy.measures:
            with torch.no_grad():
                measured = sum_ratios(strategy.measure(draft, batch, context) for batch in batches)
            context = StepContext(step=3, total_steps=10, denominators=denominators, measured=measured)
        draft.zero_grad()
        total, ratios = 0.0, []
        for batch in batches if run is None else run:
            output = strategy.loss(draft, batch, context)
            loss = torch.stack([t.weight * t.numerator / denominators[t.denominator] for t in output.terms]).sum()
            if torch.is_grad_enabled():
                loss.backward()
            total += loss.item()
            positions = {f"position {k}": ratio for k, ratio in enumerate(output.position_accuracy)}
            ratios.append({**output.metrics, **positions})
        grads = {n: p.grad.clone() for n, p in draft.named_parameters() if p.grad is not None}
        return WindowResult(total, grads, sum_ratios(ratios))

    def _whole(self, strategy: Strategy, draft: nn.Module) -> WindowResult:
        samples = self._samples(strategy)
        return self._window(strategy, draft, [strategy.collate(samples, range(len(samples)))])

    # --- discovery and configuration

    def test_plugin_module_imports_no_torch(self) -> None:
        code = f"import sys, {self.plugin} as p; p.specforge_strategies(); sys.exit('torch' in sys.modules)"
        ended = subprocess.run([sys.executable, "-c", code], timeout=60, check=False, capture_output=True, text=True)
        assert ended.returncode == 0, f"importing {self.plugin} imports torch: {ended.stderr}"

    def test_section_and_strategy_ask_for_the_same_capture(self) -> None:
        section = self.spec().config.model_validate({"name": self.name, **self.settings})
        assert section.check(self.target.info) == []
        request = self.make_strategy().capture_request(self.target.info)
        assert request == section.capture_request(self.target.info)
        assert all(0 <= layer < self.target.info.num_layers for layer in request.aux_layer_ids)

    # --- the draft

    def test_draft_is_fp32_and_reproducible_from_torchs_seed(self) -> None:
        strategy = self.make_strategy()
        first, second = (self._draft(strategy).state_dict() for _ in range(2))
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(value, second[name]), f"{name} differs between two builds with one seed"
            assert not value.is_floating_point() or value.dtype == torch.float32, f"{name} is {value.dtype}"

    def test_checkpoint_holds_what_is_trained_and_nothing_of_the_target(self) -> None:
        draft = self._draft(self.make_strategy())
        state = draft.state_dict()
        missing = {name for name, p in draft.named_parameters() if p.requires_grad} - state.keys()
        assert not missing, f"trained but not in the checkpoint: {sorted(missing)}"
        frozen = self.target.frozen_weights([EMBED_TOKENS, LM_HEAD]).values()
        copies = [n for n, v in state.items() for f in frozen if v.shape == f.shape and torch.equal(v.float(), f)]
        assert not copies, f"the target's own weights are in the checkpoint: {copies}"

    def test_checkpoint_round_trip_gives_the_same_loss(self) -> None:
        strategy = self.make_strategy()
        draft, other = self._draft(strategy), self._draft(strategy, seed=1)
        other.load_state_dict(draft.state_dict())
        assert self._whole(strategy, other).loss == self._whole(strategy, draft).loss

    def test_every_trained_parameter_gets_a_finite_gradient(self) -> None:
        strategy = self.make_strategy()
        draft = self._draft(strategy)
        grads = self._whole(strategy, draft).grads
        for name, parameter in draft.named_parameters():
            if parameter.requires_grad:
                assert name in grads, f"no gradient for {name}"
                assert bool(torch.isfinite(grads[name]).all()), f"gradient of {name} is not finite"

    def test_loss_falls_when_trained_on_one_window(self) -> None:
        strategy = self.make_strategy()
        draft = self._draft(strategy)
        optimizer = torch.optim.Adam([p for p in draft.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(15):
            losses.append(self._whole(strategy, draft).loss)
            optimizer.step()
        assert losses[-1] < losses[0]

    # --- windows

    def test_loss_and_gradient_do_not_depend_on_how_a_window_is_cut(self) -> None:
        strategy = self.make_strategy()
        draft, samples = self._draft(strategy), self._samples(strategy)
        results = [
            self._window(strategy, draft, [strategy.collate([samples[i] for i in part], part) for part in cut])
            for cut in _CUTS
        ]
        whole = results[0]
        for cut, result in zip(_CUTS[1:], results[1:], strict=True):
            assert result.loss == pytest.approx(whole.loss, rel=1e-5), f"loss differs when cut as {cut}"
            for name, grad in whole.grads.items():
                error = (result.grads[name] - grad).abs().max().item()
                assert error <= 1e-5 + 1e-4 * grad.abs().max().item(), f"gradient of {name} differs, cut {cut}"
            assert result.metrics.keys() == whole.metrics.keys()
            for name, ratio in whole.metrics.items():
                got = result.metrics[name]
                assert (got.numerator, got.denominator) == pytest.approx(
                    (ratio.numerator, ratio.denominator), rel=1e-4, abs=1e-4
                ), f"metric {name} differs when cut as {cut}"

    def test_denominators_are_counts_that_add_up(self) -> None:
        strategy = self.make_strategy()
        samples = self._samples(strategy)
        whole = strategy.collate(samples, range(4)).denominators
        parts = [strategy.collate([sample], [i]).denominators for i, sample in enumerate(samples)]
        assert whole, "no denominators"
        for name, value in whole.items():
            assert value >= 0
            assert value == pytest.approx(sum(part[name] for part in parts)), f"{name} depends on the batch"

    def test_collating_is_a_pure_function_of_samples_and_seeds(self) -> None:
        strategy = self.make_strategy()
        samples = self._samples(strategy)
        first, second = (strategy.collate(samples, [5, 6, 7, 8]) for _ in range(2))
        assert first.num_samples == len(samples)
        assert first.num_tokens == sum(_LENGTHS)
        for name, tensor in first.tensors.items():
            assert torch.equal(tensor, second.tensors[name]), f"{name} differs between two calls"

    def test_a_sample_with_nothing_trained_trains_nothing(self) -> None:
        strategy = self.make_strategy()
        draft, request = self._draft(strategy), strategy.capture_request(self.target.info)
        idle = self.target.sample("idle", num_tokens=12, request=request, trained=False)
        window = [strategy.collate(self._samples(strategy), range(4)), strategy.collate([idle], [9])]
        for name, grad in self._window(strategy, draft, window, run=window[1:]).grads.items():
            assert grad.abs().max().item() == 0, f"{name} is trained by a sample with an empty loss mask"

    def test_evaluation_without_gradient_gives_the_same_numbers(self) -> None:
        strategy = self.make_strategy()
        draft = self._draft(strategy)
        trained = self._whole(strategy, draft)
        with torch.no_grad():
            evaluated = self._whole(strategy, draft)
        assert evaluated.loss == pytest.approx(trained.loss, rel=1e-6)
        assert evaluated.metrics.keys() == trained.metrics.keys()
        positions = [ratio for name, ratio in evaluated.metrics.items() if name.startswith("position ")]
        assert positions, "no position accuracy: there would be no simulated acceptance length"
        assert all(0 <= r.numerator <= r.denominator for r in positions)

    # --- export

    def test_export_reloads_to_an_equal_draft(self, tmp_path: Path) -> None:
        strategy = self.make_strategy()
        draft = self._draft(strategy)
        for format in self.spec().export_formats:
            directory = tmp_path / format
            directory.mkdir()
            strategy.export(draft, directory, format=format, target=self.target.info)
            loaded = strategy.load_export(directory, self.target)
            expected, got = draft.state_dict(), loaded.state_dict()
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(got[name], value), f"{name} differs after export as {format}"
            assert self._propose(strategy.drafter(loaded, self.target), strategy) == self._propose(
                strategy.drafter(draft, self.target), strategy
            )

    def test_export_refuses_what_it_does_not_know(self, tmp_path: Path) -> None:
        strategy = self.make_strategy()
        with pytest.raises(ExportError):
            strategy.export(self._draft(strategy), tmp_path, format="no-such-format", target=self.target.info)
        with pytest.raises(ExportError):
            strategy.load_export(tmp_path / "nothing", self.target)

    # --- drafting

    def _propose(self, drafter: Drafter, strategy: Strategy, *, cuts: Sequence[int] = (8,), most: int = 3) -> list[int]:
        """Take in 8 positions of one sample in so many pieces, proposing after each; the last proposal."""
        request = strategy.capture_request(self.target.info)
        sample = self.target.sample("decode", num_tokens=12, request=request)
        features = {n: t for n, t in sample.features.items() if n in request.features[2:]}
        ids, start, guess = sample.features["input_ids"], 0, torch.empty(0)
        drafter.reset()
        for end in cuts:
            drafter.extend(ids[start : end + 1], {name: t[start:end] for name, t in features.items()})
            guess, start = drafter.propose(most), end
            assert (guess.dtype, guess.dim()) == (torch.int64, 1)
        return guess.tolist()

    def test_drafter_proposes_target_tokens_and_no_more_than_asked(self) -> None:
        strategy = self.make_strategy()
        drafter = strategy.drafter(self._lively_draft(strategy), self.target)
        assert drafter.max_draft_tokens >= 1
        for most in (1, drafter.max_draft_tokens, drafter.max_draft_tokens + 5):
            guess = self._propose(drafter, strategy, most=most)
            assert 1 <= len(guess) <= min(most, drafter.max_draft_tokens)
            assert all(0 <= token < self.target.info.vocab_size for token in guess)

    def test_drafter_depends_on_what_was_verified_alone(self) -> None:
        strategy = self.make_strategy()
        drafter = strategy.drafter(self._lively_draft(strategy), self.target)
        at_once = self._propose(drafter, strategy)
        assert self._propose(drafter, strategy, cuts=(5, 8)) == at_once, "earlier guesses leave traces"
        assert self._propose(drafter, strategy, cuts=(1, 2, 7, 8)) == at_once, "earlier guesses leave traces"
        assert self._propose(strategy.drafter(self._lively_draft(strategy), self.target), strategy) == at_once
