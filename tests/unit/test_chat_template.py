# SPDX-License-Identifier: Apache-2.0
"""A chat template is a program that came with the model: whatever it does ends as a DataError that names it."""

from __future__ import annotations

import signal
import threading
import time

import pytest
from specforge_core.contracts import DataError
from specforge_core.prompts.loss_mask import ConversationEncoder
from specforge_hf_target import chat_template
from specforge_hf_target.chat_template import render_template
from specforge_hf_target.config import HfTargetConfig
from specforge_hf_target.tokenizer import load_tokenizer

TALK = [{"role": "user", "content": "river"}, {"role": "assistant", "content": "stone"}]
FAILING = [
    "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
    "{{ 10 ** 400 * 1.0 }}",
    "{{ nothing.at.all }}",
    "{{ messages[9].content }}",
    "{{ messages['x'].y }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception('roles must alternate') }}",
    "{{ range(10 ** 12) | list }}",
    "{{ 'a' * 10 ** 15 }}",
    "{{ 10 ** 5000 }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ namespace(__class__=1) }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% for %}",
    "{{",
    "{{ 'x' | nonesuch }}",
    "{{ messages.append(1) }}",
    "{{ strftime_now(7) }}",
    "{{ messages | tojson(indent='x' * 10 ** 15) }}",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(HfTargetConfig(name="hf", path=str(tiny_model.path)))


@pytest.mark.parametrize("marked", ["", "{% generation %}{% endgeneration %}"])
@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails_is_named(tokenizer, template, marked):
    tokenizer._tokenizer.chat_template = template + marked
    with pytest.raises(DataError, match=r"chat template refuses the conversation: \S"):
        tokenizer.encode_with_assistant_mask(TALK) or tokenizer.render(TALK, add_generation_prompt=False)


def test_the_row_is_named_with_it(tokenizer):
    tokenizer._tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(DataError, match="division by zero") as refused:
        ConversationEncoder(tokenizer, max_length=64).encode(TALK, where="prompts.jsonl:7")
    assert refused.value.where == "prompts.jsonl:7"


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(DataError, match="has not ended after"):
        render_template(ENDLESS, TALK, tokens={})
    assert time.monotonic() - began < 5


def test_the_time_limit_leaves_other_timers_as_they_were():
    rung = threading.Event()
    former = signal.signal(signal.SIGALRM, lambda number, frame: rung.set())
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        assert render_template("x", TALK, tokens={}) == ("x", [])
        assert rung.wait(5)
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
        render_template("x", TALK, tokens={})
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        signal.signal(signal.SIGALRM, former)
        signal.setitimer(signal.ITIMER_REAL, left, interval)


def test_a_template_renders_in_another_thread_too():
    texts = []
    thread = threading.Thread(target=lambda: texts.append(render_template("x", TALK, tokens={})))
    thread.start()
    thread.join(60)
    assert texts == [("x", [])]


def test_a_text_beyond_all_conversations_is_refused(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 1000)
    assert render_template("{{ 'a' * 1000 }}", TALK, tokens={})[0] == "a" * 1000
    with pytest.raises(DataError, match="makes 1001 characters"):
        render_template("{{ 'a' * 1001 }}", TALK, tokens={})


@pytest.mark.parametrize("text", ["{{ 1 / 0 }}", "{% raw %}", "{# x #}", "{% generation %}", "}}", "\x00\x1b[2J"])
def test_what_a_conversation_says_is_text(tokenizer, text):
    tokenizer._tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    talk = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    assert tokenizer.render(talk, add_generation_prompt=False) == f"<{text}><{text}>"


def test_special_tokens_cannot_stand_for_the_renderers_own_names():
    with pytest.raises(DataError, match="multiple values"):
        render_template("x", TALK, tokens={"conversations": "x", "chat_template": "{{ 1 / 0 }}"})
