# SPDX-License-Identifier: Apache-2.0
"""A chat template is a program that came with the model: whatever it does ends as a DataError that names it."""

from __future__ import annotations

import datetime
import signal
import threading
import time

import pytest
from specforge_core.config.run_config import DataSection
from specforge_core.contracts import DataError, RenderedText
from specforge_core.prompts.conversation import Conversation
from specforge_core.prompts.masking.encoder import ConversationEncoder
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
        tokenizer.render(TALK, add_generation_prompt=False)


def test_the_row_is_named_with_it(tokenizer):
    tokenizer._tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(DataError, match="division by zero") as refused:
        ConversationEncoder(tokenizer, DataSection(train=["x"])).encode(Conversation(TALK), where="prompts.jsonl:7")
    assert refused.value.where == "prompts.jsonl:7"


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(DataError, match="has not ended after"):
        render_template(ENDLESS, TALK, variables={}, date=None)
    assert time.monotonic() - began < 5


def test_the_time_limit_leaves_other_timers_as_they_were():
    rung = threading.Event()
    former = signal.signal(signal.SIGALRM, lambda number, frame: rung.set())
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        assert render_template("x", TALK, variables={}, date=None) == RenderedText("x")
        assert rung.wait(5)
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
        render_template("x", TALK, variables={}, date=None)
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        signal.signal(signal.SIGALRM, former)
        signal.setitimer(signal.ITIMER_REAL, left, interval)


def test_a_template_renders_in_another_thread_too():
    texts = []
    thread = threading.Thread(target=lambda: texts.append(render_template("x", TALK, variables={}, date=None)))
    thread.start()
    thread.join(60)
    assert texts == [RenderedText("x")]


def test_a_text_beyond_all_conversations_is_refused(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 1000)
    assert render_template("{{ 'a' * 1000 }}", TALK, variables={}, date=None).text == "a" * 1000
    with pytest.raises(DataError, match="makes 1001 characters"):
        render_template("{{ 'a' * 1001 }}", TALK, variables={}, date=None)


@pytest.mark.parametrize("text", ["{{ 1 / 0 }}", "{% raw %}", "{# x #}", "{% generation %}", "}}", "\x00\x1b[2J"])
def test_what_a_conversation_says_is_text(tokenizer, text):
    tokenizer._tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    talk = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    assert tokenizer.render(talk, add_generation_prompt=False).text == f"<{text}><{text}>"


def test_special_tokens_cannot_stand_for_the_conversation():
    given = {"messages": [], "chat_template": "{{ 1 / 0 }}"}
    assert render_template("{{ messages | length }}", TALK, variables=given, date=None).text == "2"


def test_the_template_is_told_the_date_that_was_chosen():
    date = datetime.date(2024, 2, 29)
    assert render_template("{{ strftime_now('%d %b %Y') }}", TALK, variables={}, date=date).text == "29 Feb 2024"


def test_marks_in_a_comment_are_none():
    commented = "{# {% generation %} #}x"
    assert render_template(commented, TALK, variables={}, date=None) == RenderedText("x")
    marked = "x{%- generation -%}y{% endgeneration %}"
    assert render_template(marked, TALK, variables={}, date=None) == RenderedText("xy", [(1, 2)])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_is_shown_under_the_names_that_templates_read(key):
    talk = [{"role": "assistant", "content": "x", key: "why"}]
    for name in ("reasoning_content", "thinking"):
        template = "{{ messages[0]." + name + " }}"
        assert render_template(template, talk, variables={}, date=None).text == "why"
