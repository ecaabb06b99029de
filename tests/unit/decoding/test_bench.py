# SPDX-License-Identifier: Apache-2.0
"""The bench compares both ways of decoding honestly and calls a difference a difference."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from specforge_core.cli.bench_table import bench_table
from specforge_core.config.run_config import BenchSection
from specforge_core.contracts import BenchError, DataError, Prompt, SilentProgress
from specforge_core.decoding.bench import BenchSides, cut_prompts, find_difference, run_bench
from specforge_core.decoding.bench_result import BenchResult
from specforge_core.decoding.speculative import DecodeLimits
from toy_decoding import CountingTarget, ScriptedDrafter

PROMPTS = [Prompt(f"p{index}", [index, index + 1], [0, 0]) for index in range(5)]


def bench(*, right_until: int = 4, wrong_after: int | None = None, max_new_tokens: int = 11) -> BenchResult:
    sides = BenchSides(
        plain=CountingTarget(),
        speculative=CountingTarget(wrong_after=wrong_after),
        drafter=ScriptedDrafter(right_until=right_until),
    )
    return run_bench(
        PROMPTS,
        sides=sides,
        limits=DecodeLimits(max_new_tokens=max_new_tokens),
        draft_tokens=None,
        facts={"target": "counting"},
        progress=SilentProgress(),
    )


def test_acceptance_is_counted_over_all_prompts():
    result = bench(right_until=2)
    assert result.lossless
    assert result.acceptance_length == pytest.approx(50 / result.target_passes)
    values = [ratio.value for ratio in result.position_acceptance]
    assert values == [1.0, 1.0, 0.0, 0.0]
    assert result.acceptance_rate == pytest.approx(
        sum(r.numerator for r in result.position_acceptance) / sum(r.denominator for r in result.position_acceptance)
    )
    result.raise_if_lossy()


def test_oracle_reaches_the_most_and_a_wrong_drafter_one():
    assert bench(right_until=4).acceptance_length == 5.0
    assert bench(right_until=0).acceptance_length == 1.0


def test_a_target_that_verifies_differently_is_caught():
    result = bench(wrong_after=6)
    assert not result.lossless
    report = result.to_json()
    assert report["lossless"] is False
    found = report["per_prompt"][0]["difference"]
    assert found["position"] > 0
    assert found["plain_token"] != found["speculative_token"]
    with pytest.raises(BenchError, match=r"5 of 5 prompts") as raised:
        result.raise_if_lossy()
    assert raised.value.where == "prompt p0"


def test_json_is_complete_and_serialisable():
    report = json.loads(json.dumps(bench().to_json()))
    assert report["lossless"] is True
    assert report["prompts"] == 5
    assert report["draft_tokens"] == 4
    assert report["facts"]["target"] == "counting"
    assert report["facts"]["threads"] >= 1
    assert report["tokens_per_second"]["plain"]["decode"] > 0
    assert report["speedup"]["with_prefill"] > 0


def test_one_token_outputs_give_no_acceptance_rather_than_a_zero():
    result = bench(max_new_tokens=1)
    assert result.acceptance_length is None
    assert result.acceptance_rate is None
    assert result.to_json()["position_acceptance"] == [None] * 4


def test_table_says_whether_output_is_identical():
    console = Console(file=io.StringIO(), width=100)
    console.print(bench_table(bench(wrong_after=6)))
    assert "NO" in console.file.getvalue()


def test_prompts_are_cut_before_the_first_trained_token():
    prompts = [Prompt("a", [1, 2, 3, 4], [0, 0, 1, 1]), Prompt("b", [1, 2], [1, 1]), Prompt("c", [5, 6], [0, 1])]
    cut = cut_prompts(prompts, BenchSection(prompts=2))
    assert [(p.prompt_id, list(p.input_ids)) for p in cut] == [("a", [1, 2]), ("c", [5])]
    assert [len(p.input_ids) for p in cut_prompts(prompts, BenchSection(prompt_tokens=1))] == [1, 1, 1]


def test_nothing_to_decode_is_an_error():
    with pytest.raises(DataError, match="nothing to decode"):
        cut_prompts([Prompt("b", [1, 2], [1, 1])], BenchSection())


def test_a_shorter_output_is_a_difference():
    assert find_difference([1, 2], [1, 2]) is None
    found = find_difference([1, 2, 3], [1, 2])
    assert found is not None
    assert (found.position, found.plain_token, found.speculative_token) == (2, 3, -1)
