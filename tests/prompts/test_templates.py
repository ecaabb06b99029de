# SPDX-License-Identifier: Apache-2.0
"""Chat templates of every kind: token ids of the whole row, and trained text to the character, by an oracle.

``pytest tests/prompts --talks 10000`` is the long version (``make prompts``); a failure names what repeats it.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import oracles
import pytest
from conversations import PLAIN, TOOLS, fixed, random_talk, secrets
from specforge_core.config.run_config import DataSection
from specforge_core.contracts import DataError
from specforge_core.prompts.conversation import Conversation
from specforge_core.prompts.masking.encoder import ConversationEncoder
from specforge_hf_target.tokenizer import HfChatTokenizer
from talk import DATE, TEMPLATES, Call, Message, Piece, Refused, Talk, Template, runs

ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")
WHERE = "rows.jsonl:7"


class Then(datetime.datetime):
    """The day that templates are told."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        return datetime.datetime(*DATE)


@pytest.fixture(autouse=True)
def _pinned_date(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils.chat_template_utils as rendering

    monkeypatch.setattr(rendering, "datetime", Then)


@cache
def tokenizer_of(template: Template, *, told_stops: bool) -> Any:
    """One token per byte and the template's special tokens, so that trained text is exact to the character."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, clean_up_tokenization_spaces=False)
    fast.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in template.special], special_tokens=True
    )
    fast.add_tokens([AddedToken(text, normalized=False) for text in ADDED])
    if template.bos:
        fast.bos_token = template.bos
    if template.stops and (told_stops or template.needs_eos):
        fast.eos_token = template.stops[0]
    fast.chat_template = template.source()
    return fast


def new_encoder(template: Template, *, told_stops: bool, **chosen: Any) -> ConversationEncoder:
    fast = tokenizer_of(template, told_stops=told_stops)
    stops = [fast.convert_tokens_to_ids(text) for text in template.stops] if told_stops else []
    settings = DataSection(train=["rows.jsonl"], max_length=1 << 20, date=datetime.date(*DATE), **chosen)
    return ConversationEncoder(HfChatTokenizer(fast, "test", stop_token_ids=stops), settings)


encoder_of = cache(new_encoder)
"""Encoders learn from what they encoded, which may make no difference."""


def expected_pieces(template: Template, talk: Talk) -> Sequence[Piece] | None:
    """What the oracle says, checked to be what the template makes; None where both refuse."""
    fast = tokenizer_of(template, told_stops=True)
    rows = talk.rows(form=template.content, calls_as=template.calls_as)
    given = {"tools": list(talk.tools) or None, "tokenize": False, **talk.arguments}
    try:
        pieces = list(template.pieces(talk))
    except Refused:
        with pytest.raises(Exception):  # of many kinds; the product makes one of them
            fast.apply_chat_template(rows, **given)
        return None
    rendered = fast.apply_chat_template(rows, **given)
    assert "".join(text for text, _ in pieces) == rendered, "the oracle is wrong"
    return pieces


def fault_of(template: Template, talk: Talk, *, told_stops: bool) -> str:
    """What is wrong with what the encoder makes of a conversation; empty for nothing."""
    encoder = encoder_of(template, told_stops=told_stops)
    fault = _fault_by(encoder, template, talk, told_stops=told_stops)
    fresh = new_encoder(template, told_stops=told_stops) if fault else encoder
    if fault and not _fault_by(fresh, template, talk, told_stops=told_stops):
        return f"after other conversations, not alone: {fault}"
    return fault


def _fault_by(encoder: ConversationEncoder, template: Template, talk: Talk, *, told_stops: bool) -> str:
    pieces = expected_pieces(template, talk)
    fast = tokenizer_of(template, told_stops=told_stops)
    conversation = Conversation(talk.rows(), list(talk.tools) or None, template_arguments=talk.arguments)
    try:
        [prompt] = encoder.encode(conversation, where=WHERE)
    except DataError as error:
        if pieces is not None:
            return f"refused: {error.message} @ {error.where}"
        return "" if WHERE in str(error.where) else f"a refusal that names {error.where} only"
    if pieces is None:
        return "accepted, though the template refuses it"
    text = "".join(text for text, _ in pieces)
    encoded = fast(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(prompt.input_ids) != encoded["input_ids"]:
        return other_text(fast.decode(list(prompt.input_ids)), text)
    kinds = [trained for piece, trained in pieces for _ in piece]
    said = [kinds[start] for start, _ in encoded["offset_mapping"]]
    got = [bool(item) for item in prompt.loss_mask]
    trained = trained_texts(fast, prompt.input_ids, got)
    told = [secret for secret in secrets(talk) if any(secret in run for run in trained)]
    if told:
        return f"text of others is trained: {told} in {trained}"
    wrong = [index for index, (kind, item) in enumerate(zip(said, got, strict=True)) if kind not in (None, item)]
    if wrong and prompt.counts.get("answers_left_out") and holds_an_empty_answer(talk):
        wrong = [i for i in wrong if got[i] or fast.decode([prompt.input_ids[i]]).strip() not in template.special]
    if wrong:
        wanted = [piece for piece, kind in runs(pieces) if kind]
        free = [piece for piece, kind in runs(pieces) if kind is None]
        return f"trained {trained}\n   not {wanted}" + (f", with or without {free}" if free else "")
    return ""


def holds_an_empty_answer(talk: Talk) -> bool:
    """Whether an answer is no text at all: it may be left out, if that is counted."""
    return any(message.answers and not message.calls and not message.content.strip() for message in talk.messages)


def other_text(got: str, wanted: str) -> str:
    """Where two renderings part, in words."""
    place = next((n for n, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    return f"other tokens: {got[max(place - 20, 0) : place + 60]!r}\n   not {wanted[max(place - 20, 0) : place + 60]!r}"


def trained_texts(fast: Any, token_ids: Sequence[int], mask: Sequence[bool]) -> list[str]:
    found: list[list[int]] = [[]]
    for token, trained in zip(token_ids, mask, strict=True):
        if trained:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [fast.decode(run) for run in found if run]


def test_there_are_forty_templates_and_an_oracle_for_each() -> None:
    files = {name for template in oracles.TABLE.values() for name in template.files.values() or [template.name]}
    assert files == {path.stem for path in TEMPLATES.glob("*.jinja")}
    assert len(oracles.TABLE) >= 40


@pytest.mark.parametrize("name", list(oracles.TABLE))
def test_fixed_conversations_are_trained_as_the_oracle_says(name: str) -> None:
    template, faults = oracles.TABLE[name], list[str]()
    for about, talk in fixed(template):
        for told_stops in (True, False) if about in PLAIN or template.thoughts else (True,):
            fault = fault_of(template, talk, told_stops=told_stops)
            if fault:
                faults.append(f"{about}{'' if told_stops else ', stops not told'}: {fault}")
    assert not faults, "\n".join(["", *faults])


@pytest.mark.parametrize("name", list(oracles.TABLE))
def test_random_conversations_are_trained_as_the_oracle_says(name: str, pytestconfig: pytest.Config) -> None:
    template, faults = oracles.TABLE[name], list[str]()
    seed, only = pytestconfig.getoption("--talks-seed"), pytestconfig.getoption("--talks-only")
    most = -(-pytestconfig.getoption("--talks") // len(oracles.TABLE))
    for number in range(most) if only is None else [only]:
        chance = Random(f"{name} {seed} {number}")
        talk = random_talk(template, chance)
        fault = fault_of(template, talk, told_stops=chance.random() < 0.7)
        if fault:
            faults.append(f"talk {number}: {fault}")
        if len(faults) >= 5:
            break
    assert not faults, "\n".join(["", *faults, f"seed {seed}"])


@pytest.mark.parametrize("name", list(oracles.TABLE))
def test_samples_of_turns_are_conversations_that_end_with_their_answers(name: str) -> None:
    template = oracles.TABLE[name]
    encoder = new_encoder(template, told_stops=True, samples="turn")
    fast = tokenizer_of(template, told_stops=True)
    for number in range(5):
        talk = random_talk(template, Random(f"{name} turns {number}"))
        if expected_pieces(template, talk) is None:
            continue
        parts = [replace(talk, messages=talk.messages[: n + 1]) for n, m in enumerate(talk.messages) if m.answers]
        conversation = Conversation(talk.rows(), list(talk.tools) or None, template_arguments=talk.arguments)
        prompts = encoder.encode(conversation, where=WHERE)
        assert len(prompts) == len(parts)
        for part, prompt in zip(parts, prompts, strict=True):
            if not any(message.role == "user" for message in part.messages):
                continue
            pieces = expected_pieces(template, part)
            assert pieces is not None
            encoded = fast("".join(p for p, _ in pieces), add_special_tokens=False, return_offsets_mapping=True)
            assert list(prompt.input_ids) == encoded["input_ids"]
            kinds = [trained for piece, trained in pieces for _ in piece]
            said = [kinds[start] for start, _ in encoded["offset_mapping"]]
            first = prompt.loss_mask.index(1) if 1 in prompt.loss_mask else len(said)
            assert 1 in prompt.loss_mask or not part.messages[-1].content.strip(), f"talk {number}: {part}"
            wrong = [n for n in range(first, len(said)) if said[n] not in (None, bool(prompt.loss_mask[n]))]
            assert not wrong, f"talk {number}: {trained_texts(fast, prompt.input_ids, prompt.loss_mask)} of {pieces}"


@pytest.mark.parametrize("name", list(oracles.TABLE))
def test_an_answer_that_is_not_to_be_trained_takes_its_own_text_alone_from_the_mask(name: str) -> None:
    """And the masks that the single answers lose are, together, the whole mask."""
    template, tried = oracles.TABLE[name], 0
    for number in range(8):
        talk = random_talk(template, Random(f"{name} untrained {number}"))
        answers = [index for index, message in enumerate(talk.messages) if message.answers]
        conversation = Conversation(talk.rows(), list(talk.tools) or None, template_arguments=talk.arguments)
        encoder = encoder_of(template, told_stops=True)
        try:
            [whole] = encoder.encode(conversation, where=WHERE)
        except DataError:
            continue
        sums = [0] * len(whole.loss_mask)
        for index in answers:
            [other] = encoder.encode(replace(conversation, untrained=frozenset({index})), where=WHERE)
            lost = [a - b for a, b in zip(whole.loss_mask, other.loss_mask, strict=True)]
            sums = [a + b for a, b in zip(sums, lost, strict=True)]
        assert sums == list(whole.loss_mask), f"talk {number}: {talk}"
        tried += 1
    assert tried


@pytest.mark.parametrize("name", [name for name, template in oracles.TABLE.items() if not template.tools])
def test_a_call_that_a_template_does_not_render_is_refused(name: str) -> None:
    """Else the draft would learn to end the turn where the target calls."""
    template = oracles.TABLE[name]
    messages = [Message("user", "Oslo?"), Message("assistant", calls=[Call("get_weather", {"city": "Oslo"})])]
    conversation = Conversation(Talk(messages).rows(), TOOLS)
    with pytest.raises(DataError) as refused:
        encoder_of(template, told_stops=True).encode(conversation, where=WHERE)
    assert WHERE in str(refused.value.where)
