# SPDX-License-Identifier: Apache-2.0
"""The shared building blocks against their plain forms."""

from __future__ import annotations

import time

import pytest
import torch
from specforge_core.contracts import ConfigError, DataError, TargetError
from specforge_core.modeling import (
    FrozenEmbedding,
    FrozenHead,
    QueryLayout,
    RMSNorm,
    RotaryEmbedding,
    VocabMap,
    attend,
    attend_plain,
    causal_padding_mask,
    gated_mlp,
    rms_norm,
    rms_norm_linear,
)
from torch.nn import functional

torch.set_num_threads(1)


def test_vocabulary_keeps_the_most_frequent_and_ties_go_to_the_smaller_id():
    vocabulary = VocabMap.from_counts(torch.tensor([5, 0, 7, 5, 0, 5, 1]), 4)
    assert vocabulary.target_ids.tolist() == [0, 2, 3, 5]
    assert vocabulary.d2t.tolist() == [0, 1, 1, 2]
    assert vocabulary.t2d.tolist() == [True, False, True, True, False, True, False]
    vocabulary.check()


def test_vocabulary_is_filled_with_the_smallest_unused_ids():
    assert VocabMap.from_counts(torch.tensor([0, 0, 0, 0, 3, 0]), 4).target_ids.tolist() == [0, 1, 2, 4]


def test_vocabulary_refuses_what_it_cannot_choose_from():
    with pytest.raises(DataError, match="no trained token"):
        VocabMap.from_counts(torch.zeros(9, dtype=torch.int64), 4)
    with pytest.raises(DataError, match="does not fit"):
        VocabMap.from_counts(torch.ones(9, dtype=torch.int64), 10)
    with pytest.raises(DataError, match="same draft vocabulary"):
        VocabMap(torch.tensor([True, True, False]), torch.tensor([0, 1])).check()


def test_a_large_vocabulary_takes_no_time():
    counts = torch.randint(0, 1000, (151_936,))
    begin = time.perf_counter()
    VocabMap.from_counts(counts, 32_000)
    assert time.perf_counter() - begin < 1.0


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda p: p["rope_type"],
)
def test_angles_equal_those_of_the_targets_own_library(parameters):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, head_dim=64, max_position_embeddings=256, rope_parameters=parameters
    )
    positions = torch.arange(200)
    cosine, sine = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    ours = RotaryEmbedding(parameters, head_dim=64).at(positions, 200)
    torch.testing.assert_close(ours[0], cosine[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], sine[0], rtol=1e-5, atol=1e-5)


def test_unknown_rope_is_refused_by_name():
    with pytest.raises(ConfigError, match="longrope"):
        RotaryEmbedding({"rope_type": "longrope", "rope_theta": 1e4}, head_dim=8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rope_type": ["yarn"]},
        {"rope_theta": 1.0},
        {"rope_theta": float("nan")},
        {"rope_theta": 10**400},
        {"rope_theta": True},
        {"rope_type": "linear", "factor": 0},
        {"rope_type": "linear", "factor": "2"},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_slow": -1.0},
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
        | {"low_freq_factor": 4.0, "high_freq_factor": 1.0},
    ],
    ids=str,
)
def test_rope_that_is_no_rotation_is_refused(wrong):
    with pytest.raises(ConfigError, match="RoPE") as refused:
        RotaryEmbedding({"rope_theta": 1e4, **wrong}, head_dim=8)
    assert refused.value.where == "rope_parameters"


def test_fused_norm_and_gated_layers_equal_autograd():
    torch.manual_seed(0)
    norm, eps = RMSNorm(16, eps=1e-5).double().float(), 1e-5
    x, matrix = torch.randn(7, 16, requires_grad=True), torch.randn(12, 16, requires_grad=True)
    gate_up, down = torch.randn(20, 16, requires_grad=True), torch.randn(16, 10, requires_grad=True)
    leaves = [x, matrix, gate_up, down, norm.weight]
    norm.weight.data.uniform_(0.5, 1.5)

    def plain_norm(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * norm.weight

    gate, up = (plain_norm(x) @ gate_up.T).chunk(2, -1)
    plain = (plain_norm(x) @ matrix.T).sin().sum() + ((functional.silu(gate) * up) @ down.T).sin().sum()
    plain = plain + plain_norm(x).sin().sum()
    fused = (
        rms_norm_linear(x, norm, matrix).sin().sum() + gated_mlp(x, norm, gate_up_FH=gate_up, down_HF=down).sin().sum()
    )
    fused = fused + rms_norm(x, norm.weight, eps).sin().sum()
    torch.testing.assert_close(fused, plain)
    for got, expected in zip(torch.autograd.grad(fused, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def _attention_case(layout, *, groups, own, length, dtype=torch.float32):
    torch.manual_seed(1)
    count = layout.batch * layout.length if layout.rows is None else layout.rows.shape[0]
    heads, size = 4, 8
    query = torch.randn(count, heads, size, dtype=dtype)
    key, value = torch.randn(2, layout.batch, heads // groups, length, size, dtype=dtype)
    pairs = torch.randn(own, 2, count, heads // groups, size, dtype=dtype)
    return [query, key, value, *pairs.flatten(0, 1)]


LAYOUTS = [
    QueryLayout(2, 0, 40),
    QueryLayout(2, 25, 15),
    QueryLayout(1, 39, 1),
    QueryLayout(2, 10, 30, torch.tensor([0, 1, 5, 29, 31, 59])),
    QueryLayout(2, 0, 40, None, causal_padding_mask(torch.arange(40).expand(2, 40) != 7, offset=0)),
    QueryLayout(2, 5, 35, torch.tensor([3, 50]), causal_padding_mask(torch.arange(40).expand(2, 40) > 3, offset=5)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda la: f"offset{la.offset}-{la.length}")
@pytest.mark.parametrize(("groups", "own"), [(1, 0), (2, 3), (4, 1)])
def test_merged_attention_equals_the_plain_softmax(layout, groups, own):
    results = []
    for attention in (attend, attend_plain):
        tensors = [t.requires_grad_() for t in _attention_case(layout, groups=groups, own=own, length=40)]
        pairs = list(zip(tensors[3::2], tensors[4::2], strict=True))
        out = attention(layout, *tensors[:3], own=pairs)
        results.append([out, *torch.autograd.grad(out.sin().sum(), tensors)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)


def test_merged_attention_stays_exact_with_huge_scores():
    layout = QueryLayout(1, 0, 30)
    query, key, value, *own = _attention_case(layout, groups=1, own=2, length=30)
    pairs = [(own[0] * 30, own[1]), (own[2] * -30, own[3])]
    expected = attend_plain(layout, query * 20, key * 20, value, own=pairs)
    torch.testing.assert_close(attend(layout, query * 20, key * 20, value, own=pairs), expected, rtol=1e-4, atol=1e-5)


def test_frozen_parts_are_unusable_until_loaded_and_never_in_the_state():
    head, embedding = FrozenHead(9, 4, norm_eps=1e-6), FrozenEmbedding(9, 4)
    assert not head.state_dict()
    assert not embedding.state_dict()
    assert embedding(torch.tensor([1])).isnan().all()
    with pytest.raises(TargetError, match="never loaded"):
        head.require_loaded()
    with pytest.raises(TargetError, match=r"\[8, 4\], expected \[9, 4\]"):
        head.load(torch.randn(8, 4))
    weight, norm = torch.randn(9, 4), torch.rand(4)
    head.load(weight, norm)
    head.require_loaded()
    x = torch.randn(3, 4)
    torch.testing.assert_close(head.logits(x), (functional.rms_norm(x, (4,), norm, 1e-6)) @ weight.T)
