# SPDX-License-Identifier: Apache-2.0
"""Strategies keep their contract, and the suite rejects strategies that do not."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from specforge_core.contracts import Batch, LossTerm, StepOutput, Strategy
from specforge_core.testing.conformance import assert_rejected
from specforge_core.testing.strategy_suite import StrategySuite
from specforge_eagle3.config import Eagle3Config
from specforge_eagle3.drafter import Eagle3Drafter
from specforge_eagle3.strategy import Eagle3Strategy


class TestEagle3(StrategySuite):
    plugin = "specforge_eagle3.plugin"
    name = "eagle3"
    settings: ClassVar = {"draft_vocab_size": 40, "ttt_steps": 3}


class TestEagle3FullVocabularyPreNorm(TestEagle3):
    settings: ClassVar = {"ttt_steps": 2, "last_hidden_norm": "pre", "fc_norm": True, "norm_output": False}


class TestEagle3Alpha(TestEagle3):
    settings: ClassVar = {"draft_vocab_size": 40, "ttt_steps": 3, "lk_loss_type": "alpha"}


class TestEagle3Lambda(TestEagle3):
    settings: ClassVar = {
        "draft_vocab_size": 40,
        "ttt_steps": 3,
        "lk_loss_type": "lambda",
        "kl_scale": 0.6,
        "loss_normalizer": "positions",
    }


class _Broken(Eagle3Strategy):
    def __init__(self) -> None:
        super().__init__(Eagle3Config(draft_vocab_size=40, ttt_steps=3))


def suite_of(strategy: type[Strategy]) -> type[StrategySuite]:
    class Suite(StrategySuite):
        plugin = "specforge_eagle3.plugin"
        name = "eagle3"
        settings: ClassVar = {"draft_vocab_size": 40, "ttt_steps": 3}

        def make_strategy(self) -> Strategy:
            return strategy()

    Suite.__name__ = strategy.__name__
    return Suite


class AveragesInsteadOfSums(_Broken):
    def loss(self, draft, batch, ctx):
        output = super().loss(draft, batch, ctx)
        mean = output.terms[0].numerator / batch.denominators["tokens"] * ctx.denominators["tokens"]
        return StepOutput([LossTerm("tokens", mean)], output.position_accuracy, output.metrics)


class CountsPadding(_Broken):
    def collate(self, samples, seeds):
        batch = super().collate(samples, seeds)
        padded = {**batch.denominators, "tokens": float(batch.tensors["input_ids"].numel())}
        return Batch(batch.tensors, padded, batch.num_samples, batch.num_tokens)


class PadsOnTheLeft(_Broken):
    def collate(self, samples, seeds):
        batch = super().collate(samples, seeds)
        longest = batch.tensors["input_ids"].shape[1]
        moved = {
            name: torch.stack([t.roll(longest - s.num_tokens, 0) for t, s in zip(tensor, samples, strict=True)])
            for name, tensor in batch.tensors.items()
        }
        return Batch(moved, batch.denominators, batch.num_samples, batch.num_tokens)


class UsesGlobalRandomness(_Broken):
    def collate(self, samples, seeds):
        batch = super().collate(samples, seeds)
        noisy = {**batch.tensors, "loss_mask": batch.tensors["loss_mask"] & (torch.rand(1) > 0.5)}
        noisy["aux_hidden_states"] = batch.tensors["aux_hidden_states"] + torch.randn(1)
        return Batch(noisy, batch.denominators, batch.num_samples, batch.num_tokens)


class KeepsTheTargetsHead(_Broken):
    def build_draft(self, target):
        draft = super().build_draft(target)
        draft.register_buffer("copy_of_head", draft.target_head.weight.clone())
        return draft


class IgnoresTheSeed(_Broken):
    def build_draft(self, target):
        torch.seed()
        return super().build_draft(target)


class FreezesNothingButTrainsLess(_Broken):
    def loss(self, draft, batch, ctx):
        draft.midlayer.self_attn.q_proj.weight.grad = None
        output = super().loss(draft, batch, ctx)
        return StepOutput(
            [LossTerm("tokens", output.terms[0].numerator.detach() + draft.norm.weight.sum() * 0)],
            output.position_accuracy,
            output.metrics,
        )


class LosesAWeightOnExport(_Broken):
    def load_export(self, directory, target):
        draft = super().load_export(directory, target)
        draft.norm.weight.data.fill_(1.0).add_(1e-3)
        return draft


class AcceptsAnyFormat(_Broken):
    def export(self, draft, directory, *, format, target):
        super().export(draft, directory, format="sglang", target=target)


class _Forgetful(Eagle3Drafter):
    def extend(self, token_ids, features):
        self._length = 0  # forgets all but the newest positions
        super().extend(token_ids, features)


class DrafterForgets(_Broken):
    def drafter(self, draft, target):
        return _Forgetful(draft, max_draft_tokens=3)


class _DraftIds(Eagle3Drafter):
    def propose(self, max_tokens):
        return super().propose(max_tokens + 1)


class DrafterProposesTooMuch(_Broken):
    def drafter(self, draft, target):
        return _DraftIds(draft, max_draft_tokens=3)


@pytest.mark.parametrize(
    ("strategy", "test"),
    [
        (AveragesInsteadOfSums, "test_loss_and_gradient_do_not_depend_on_how_a_window_is_cut"),
        (CountsPadding, "test_denominators_are_counts_that_add_up"),
        (PadsOnTheLeft, "test_loss_and_gradient_do_not_depend_on_how_a_window_is_cut"),
        (UsesGlobalRandomness, "test_collating_is_a_pure_function_of_samples_and_seeds"),
        (KeepsTheTargetsHead, "test_checkpoint_holds_what_is_trained_and_nothing_of_the_target"),
        (IgnoresTheSeed, "test_draft_is_fp32_and_reproducible_from_torchs_seed"),
        (FreezesNothingButTrainsLess, "test_every_trained_parameter_gets_a_finite_gradient"),
        (LosesAWeightOnExport, "test_export_reloads_to_an_equal_draft"),
        (AcceptsAnyFormat, "test_export_refuses_what_it_does_not_know"),
        (DrafterForgets, "test_drafter_depends_on_what_was_verified_alone"),
        (DrafterProposesTooMuch, "test_drafter_proposes_target_tokens_and_no_more_than_asked"),
    ],
)
def test_suite_rejects_a_broken_strategy(strategy, test):
    assert_rejected(suite_of(strategy), by=test)
