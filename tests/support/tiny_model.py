# SPDX-License-Identifier: Apache-2.0
"""A tiny real target on disk, with prompts for it."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    *("the", "draft", "proposes", "several", "tokens", "and", "target", "checks"),
    *("them", "in", "one", "pass", "so", "output", "stays", "exactly", "same"),
]


@dataclass(frozen=True)
class TinyModel:
    """A random Qwen3 of four layers on disk, its tokenizer, and conversations for it."""

    path: Path
    train: Path
    eval: Path
    vocab_size: int


def _write_conversations(path: Path, count: int, seed: int) -> None:
    generator = random.Random(seed)
    with path.open("w") as out:
        for _ in range(count):
            ask = " ".join(generator.choices(WORDS, k=generator.randint(3, 9)))
            answer = " ".join(generator.choices(WORDS, k=generator.randint(8, 24)))
            messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}) + "\n")


def write_tiny_model(root: Path) -> TinyModel:
    """Real files that transformers loads: config, safetensors, tokenizer with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "user assistant system\n"] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(root / "model")
    torch.manual_seed(0)
    vocab_size = len(fast)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = fast.eos_token_id
    model.save_pretrained(root / "model")
    _write_conversations(root / "train.jsonl", 24, seed=1)
    _write_conversations(root / "eval.jsonl", 6, seed=2)
    return TinyModel(root / "model", root / "train.jsonl", root / "eval.jsonl", vocab_size)
