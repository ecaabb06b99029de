# SPDX-License-Identifier: Apache-2.0
"""What is secret in a setting stays out of every text that is made of it."""

from __future__ import annotations

import time

import pytest
from specforge_core.contracts.redaction import hide_secrets, redact_message, show_value, visible, without_secrets

SECRET = "wonderful-secret"


@pytest.mark.parametrize(
    "value",
    [
        f"redis://:{SECRET}@127.0.0.1:6379/0",
        f"redis://{SECRET}@127.0.0.1:6379/0",
        f"redis://:a/{SECRET}@h:1/0",
        f"redis://:a#{SECRET}@h:1/0",
        f"redis://:a?{SECRET}@h:1/0",
        f"redis://:a@{SECRET}@h:1/0",
        f"redis://:a {SECRET}@h:1/0",
        f"redis://:{SECRET}",
        f"redis://user:{SECRET}",
        f"redis://:{SECRET}%40127.0.0.1:6379/0",
        f"redis:/:{SECRET}@h",
        f":{SECRET}@h:6379",
        f"http://h/?password={SECRET}",
        f"redis://h:1/0?x=1&token={SECRET}",
        f"redis://h:1/0#{SECRET}",
        f"{{name: redis, password: {SECRET}}}",
        f"{{name: redis, url: 'redis://:{SECRET}@h'}}",
        f'{{"access_token": "two words {SECRET}"}}',
    ],
)
def test_a_setting_is_shown_without_its_secret(value: str) -> None:
    for text in (hide_secrets(value), show_value(value), show_value({"url": value}), show_value([[value]])):
        assert SECRET not in text
        assert "…" in text


@pytest.mark.parametrize("value", ["redis://127.0.0.1:6379/0", "a/b.jsonl", "training.epochs=2", "unix:///run/r.sock"])
def test_a_setting_without_a_secret_is_shown_as_it_is(value: str) -> None:
    assert hide_secrets(value) == redact_message(value) == without_secrets(value) == value


def test_what_would_play_with_a_terminal_is_spelt_out() -> None:
    assert visible("plain: ünïcode\n\ttext") == "plain: ünïcode\n\ttext"
    assert visible("\x1b[2J\rerror\u202e") == "\\x1b[2J\\rerror\\u202e"


def test_an_entry_with_a_secrets_name_is_hidden_and_not_kept() -> None:
    values = {"password": SECRET, "auth_token": SECRET, "nested": {"api_key": SECRET}, "draft_tokens": 4}
    assert SECRET not in show_value(values)
    assert without_secrets(values) == {"nested": {}, "draft_tokens": 4}


def test_messages_lose_passwords_and_keep_the_rest() -> None:
    message = f"open 'redis://u:{SECRET}@h:1/0' failed: http://h/?token={SECRET}&x=1 mail a@b"
    assert redact_message(message) == "open 'redis://…@h:1/0' failed: http://h/?token=…&x=1 mail a@b"


@pytest.mark.parametrize("address", [f"https:/u:{SECRET}@h/x does not exist", f"redis://u:it's{SECRET}@h"])
def test_a_message_loses_the_password_of_an_address_that_is_no_good_one(address: str) -> None:
    assert SECRET not in redact_message(address)
    assert SECRET not in without_secrets(address)


@pytest.mark.parametrize("piece", ["a", "a:/", "?a", "token", "a.b-", "@"])
def test_a_long_message_is_redacted_at_once(piece: str) -> None:
    began = time.monotonic()
    redact_message(piece * 100_000)
    without_secrets(piece * 100_000)
    assert time.monotonic() - began < 1


def test_what_is_kept_connects_as_before_without_the_password() -> None:
    assert without_secrets([f"redis://u:{SECRET}@h:1/0?db=1&password={SECRET}"]) == ["redis://h:1/0?db=1"]


def test_a_value_of_any_size_is_shown_at_once() -> None:
    bomb: object = ["x"] * 10
    for _ in range(30):
        bomb = [bomb] * 10
    began = time.monotonic()
    assert len(show_value(bomb)) <= 61
    assert len(show_value({"a": bomb, "b": 10**5000})) <= 61
    assert show_value(10**5000) == "a very large number"
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("text", ["a", "a://", "?a.", "token", "token: ", "@", "a://b@"])
def test_a_long_text_is_redacted_at_once(text: str) -> None:
    long = text * (100_000 // len(text))
    began = time.monotonic()
    for redact in (redact_message, hide_secrets, without_secrets, show_value):
        redact(long)
    assert time.monotonic() - began < 2
