# SPDX-License-Identifier: Apache-2.0
"""The demo's target is made once, completely, of the standard library."""

from __future__ import annotations

import json

import pytest
from specforge_core.config.run_config import DataSection
from specforge_core.contracts import DataError, SilentProgress
from specforge_core.prompts.conversation import Conversation
from specforge_core.prompts.masking.encoder import ConversationEncoder
from specforge_hf_target.config import HfTargetConfig
from specforge_hf_target.demo_corpus import read_corpus
from specforge_hf_target.demo_target import prepare_within
from specforge_hf_target.demo_training import DemoBudget
from specforge_hf_target.tokenizer import load_tokenizer

TINY = DemoBudget(
    vocab_size=400,
    hidden_size=64,
    num_layers=2,
    steps=3,
    batch_tokens=256,
    max_tokens=64,
    answered_prompts=6,
    held_out_prompts=4,
    prompt_tokens=400,
    answer_tokens=5,
    max_files=20,
    threads=1,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return cache, prepare_within(cache, budget=TINY, progress=SilentProgress())


def test_corpus_repeats_and_holds_files_out():
    corpus = read_corpus(max_files=20)
    assert corpus == read_corpus(max_files=20)
    assert not set(corpus.train) & set(corpus.held_out)
    assert all(exchange.user.lstrip().startswith(("def", "async", "@")) for exchange in corpus.train)


def test_target_is_one_that_the_engine_describes(made):
    _, target = made
    config = HfTargetConfig(name="hf", **target.section)
    info = config.describe()
    assert (info.architecture, info.num_layers, info.hidden_size) == ("Qwen3ForCausalLM", 2, 64)
    messages = json.loads(target.eval_prompts.read_text().splitlines()[0])["messages"]
    tokenizer = load_tokenizer(config)
    [encoded] = ConversationEncoder(tokenizer, DataSection(train=["x"])).encode(Conversation(messages), where="")
    ids, mask = encoded.input_ids, encoded.loss_mask
    given = tokenizer.encode(tokenizer.render(messages[:1], add_generation_prompt=True).text).input_ids
    assert list(ids[: list(mask).index(1)]) == list(given)
    assert 0 < sum(mask) < len(ids)
    assert ids[max(i for i, trained in enumerate(mask) if trained)] in info.eos_token_ids


def test_prompts_are_conversations_that_the_target_answered(made):
    _, target = made
    for path, most in ((target.train_prompts, 6), (target.eval_prompts, 4)):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert 0 < len(rows) <= most
        assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in rows)


def test_second_demo_finds_the_first_ones_target(made):
    cache, target = made
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert prepare_within(cache, budget=TINY, progress=SilentProgress()) == target
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_too_little_text_is_said(tmp_path):
    with pytest.raises(DataError, match="held-out"):
        prepare_within(tmp_path, budget=DemoBudget(max_files=1), progress=SilentProgress())
