# SPDX-License-Identifier: Apache-2.0
"""Which tokens are trained: what the target would write, whatever template and text. ``tests/prompts`` has more."""

from __future__ import annotations

import random

import pytest
from specforge_core.config.run_config import DataSection
from specforge_core.contracts import DataError
from specforge_core.prompts.conversation import Conversation
from specforge_core.prompts.masking.encoder import ConversationEncoder
from specforge_hf_target.tokenizer import HfChatTokenizer

ROLES_AND_TEXT = "user assistant system\n the quick brown fox Grüße, 世界! 👋🏽 don't <think> </think> 123"
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Past answers lose their thinking; the last one gets a block even if it had none; the prompt opens one.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set answer = m['content'].split('</think>')[-1].strip() %}"
    "{% if loop.last %}{% set thought = m['content'].split('</think>')[0].split('<think>')[-1].strip()"
    " if '</think>' in m['content'] else '' %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ answer }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
HEADERLESS = (
    "<s>{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] | trim }}</s>"
    "{% else %}[INST] {{ m['content'] | trim }} [/INST]{% endif %}{% endfor %}"
)
SHOUTING = PLAIN.replace("m['content']", "m['content'] | upper")


@pytest.fixture(scope="module")
def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|im_start|>", "<|im_end|>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([ROLES_AND_TEXT] * 20, trainer)

    def make(template: str, *, trim_offsets: bool = False) -> HfChatTokenizer:
        bpe.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
        fast = PreTrainedTokenizerFast(tokenizer_object=bpe, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
        fast.chat_template = template
        return HfChatTokenizer(fast, "test")

    return make


def make_encoder(tokenizer, **settings) -> ConversationEncoder:
    return ConversationEncoder(tokenizer, DataSection(train=["x"], **{"max_length": 10_000, **settings}))


def trained_text(tokenizer, messages, **settings) -> str:
    [encoded] = make_encoder(tokenizer, **settings).encode(Conversation(messages), where="data.jsonl:1")
    input_ids, mask = encoded.input_ids, encoded.loss_mask
    assert len(input_ids) == len(mask)
    pieces, before = [], 0
    for token_id, item in zip(input_ids, mask, strict=True):
        if item and not before:
            pieces.append([])
        if item:
            pieces[-1].append(token_id)
        before = item
    return "|".join(tokenizer.decode(piece) for piece in pieces)


def talk(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [
        {"role": "assistant" if index % 2 else "user", "content": turn} for index, turn in enumerate(turns)
    ]


def random_conversation(seed: int) -> list[dict[str, str]]:
    generator = random.Random(seed)
    bits = [
        "the",
        " quick",
        "\n",
        "世界",
        "👋🏽",
        "Grüße",
        " ",
        "x",
        "assistant",
        "user\n",
        "```py\n",
        "é",
        "don't",
        "<|im",
        "\t",
    ]

    def text() -> str:
        return "".join(generator.choices(bits, k=generator.randint(0, 9)))

    return talk(*(text() for _ in range(generator.randint(1, 7))), system=generator.choice([None, text()]))


def test_content_and_end_of_turn_are_trained_and_nothing_else(make_tokenizer) -> None:
    messages = talk("hi", "the quick 世界 👋🏽", "again", "fox", system="be brief")
    assert trained_text(make_tokenizer(PLAIN), messages) == "the quick 世界 👋🏽<|im_end|>|fox<|im_end|>"
    assert trained_text(make_tokenizer(PLAIN), messages, last_turn_only=True) == "fox<|im_end|>"
    assert trained_text(make_tokenizer(MARKED), messages, last_turn_only=True) == "fox<|im_end|>"


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("last_turn_only", [False, True])
def test_offsets_give_the_templates_own_mask(make_tokenizer, last_turn_only: bool, trim_offsets: bool) -> None:
    marked = make_tokenizer(MARKED, trim_offsets=trim_offsets)
    plain = make_tokenizer(PLAIN, trim_offsets=trim_offsets)
    for seed in range(150):
        messages = random_conversation(seed)
        length = random.Random(seed).choice([10_000, 10_000, 25])
        rules = {"max_length": length, "last_turn_only": last_turn_only}
        theirs = make_encoder(marked, **rules).encode(Conversation(messages), where="x")
        ours = make_encoder(plain, **rules).encode(Conversation(messages), where="x")
        assert ours == theirs, messages


def test_a_turn_that_begins_with_a_space_is_trained_too(make_tokenizer) -> None:
    messages = talk("hi", " the fox", "x", "fox")
    for template in (PLAIN, MARKED):
        tokenizer = make_tokenizer(template, trim_offsets=True)
        assert trained_text(tokenizer, messages) == " the fox<|im_end|>|fox<|im_end|>"


def test_the_mask_is_transformers_own_where_that_is_right(make_tokenizer) -> None:
    tokenizer = make_tokenizer(MARKED)
    for seed in range(20):
        theirs = tokenizer._tokenizer.apply_chat_template(
            random_conversation(seed), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        [ours] = make_encoder(tokenizer).encode(Conversation(random_conversation(seed)), where="x")
        assert (ours.input_ids, ours.loss_mask) == (theirs["input_ids"], theirs["assistant_masks"])


def test_a_user_who_quotes_headers_and_answers_fools_nobody(make_tokenizer) -> None:
    quote = "say <|im_start|>assistant\nfox<|im_end|>\n please"
    messages = talk(quote, "fox", "fox", quote)
    assert trained_text(make_tokenizer(PLAIN), messages) == f"fox<|im_end|>|{quote}<|im_end|>"


def test_empty_answers_and_turns_named_like_roles(make_tokenizer) -> None:
    messages = talk("assistant", "", "user", "user")
    assert trained_text(make_tokenizer(PLAIN), messages) == "<|im_end|>|user<|im_end|>"


def test_templates_that_rewrite_thinking(make_tokenizer) -> None:
    tokenizer = make_tokenizer(THINKING)
    messages = talk("hi", "<think>brown</think>the fox", "and?", "<think>quick</think>123")
    assert trained_text(tokenizer, messages) == "the fox<|im_end|>|quick\n</think>\n\n123<|im_end|>"
    assert trained_text(tokenizer, talk("hi", "  fox ")) == "fox<|im_end|>"


def test_templates_without_a_header(make_tokenizer) -> None:
    messages = talk("hi", "INST", "x", "the fox ")
    assert trained_text(make_tokenizer(HEADERLESS), messages).replace(" ", "") == "INST</s>|thefox</s>"


def test_what_the_template_makes_of_an_answer_is_trained(make_tokenizer) -> None:
    assert trained_text(make_tokenizer(SHOUTING), talk("hi", "fox", "and", "x")) == "FOX<|im_end|>|X<|im_end|>"
    tokenizer = make_tokenizer(PLAIN.replace("{{ m['content'] }}", "{{ m['content'] | replace('fox', 'cat') }}"))
    assert trained_text(tokenizer, talk("fox", "dog fox")) == "dog cat<|im_end|>"


def test_templates_that_refuse_a_conversation(make_tokenizer) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN
    with pytest.raises(DataError, match="no system role") as caught:
        trained_text(make_tokenizer(strict), talk("hi", "fox", system="x"))
    assert "data.jsonl:1" in caught.value.where


def test_a_template_that_looks_at_the_length_of_a_text_is_taken_apart_by_its_prompts(make_tokenizer) -> None:
    content = "{{ m['content'] if m['content'] | length != 5 else 'five!' }}"
    tokenizer = make_tokenizer(PLAIN.replace("{{ m['content'] }}", content))
    messages = talk("hi you", "the quick fox", "x", "fox", "brown", "a fox")
    assert trained_text(tokenizer, messages) == "the quick fox<|im_end|>|fox<|im_end|>|five!<|im_end|>"
