# SPDX-License-Identifier: Apache-2.0
"""The hf target engine against transformers' own forward pass, on tiny random models written to disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from specforge_core.contracts import CaptureRequest, DataError, Prompt, TargetError
from specforge_hf_target.config import HfTargetConfig
from specforge_hf_target.engine import HfTargetEngine
from specforge_hf_target.tokenizer import load_tokenizer

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = {
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16, "tie_word_embeddings": False}),
    "llama-tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "mistral-sliding": (transformers.MistralConfig, {"sliding_window": 4, "tie_word_embeddings": False}),
    "gemma3": (transformers.Gemma3TextConfig, {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2}),
    "gpt-neox": (transformers.GPTNeoXConfig, {}),
}
REQUEST = CaptureRequest(aux_layer_ids=(3, 0, 4), last_hidden_norm="post")


@pytest.fixture(scope="module", params=list(KINDS))
def directory(request, tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


def write_model(path: Path, kind: str, **save) -> Path:
    torch.manual_seed(7)
    config_class, extra = KINDS[kind]
    model = transformers.AutoModelForCausalLM.from_config(config_class(**SHAPE, **extra))
    for parameter in model.parameters():  # norms that are all ones would hide a missing norm
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path, **save)
    return path


def make_engine(path: Path, **settings) -> HfTargetEngine:
    return HfTargetEngine(HfTargetConfig(name="hf", path=str(path), **settings))


def make_prompts(*lengths: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    return [
        Prompt(f"p{i}", torch.randint(3, 96, (n,), generator=generator).tolist(), [0] * (n // 2) + [1] * (n - n // 2))
        for i, n in enumerate(lengths)
    ]


@torch.no_grad()
def hidden_states(path: Path, prompt: Prompt) -> tuple[torch.Tensor, ...]:
    """hidden_states[i + 1] is the output of layer i, except the last, which has passed the final norm."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    return model(torch.tensor([prompt.input_ids]), output_hidden_states=True).hidden_states


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


def test_capture_is_what_transformers_calls_hidden_states(directory: Path) -> None:
    prompts = make_prompts(9, 14, 1)
    request = CaptureRequest(aux_layer_ids=(3, 0), last_hidden_norm="post")
    samples = list(make_engine(directory).capture(prompts, request, epoch=2))
    assert [sample.sample_id for sample in samples] == ["p0.e2", "p1.e2", "p2.e2"]
    for prompt, sample in zip(prompts, samples, strict=True):
        states = hidden_states(directory, prompt)
        assert set(sample.specs()) == set(request.specs(prompt.num_tokens, 32))
        close(sample.features["aux_hidden_states"], torch.stack([states[4][0], states[1][0]], dim=1))
        close(sample.features["last_hidden_states"], states[-1][0])
        assert sample.features["input_ids"].tolist() == prompt.input_ids
        assert sample.features["loss_mask"].tolist() == [bool(m) for m in prompt.loss_mask]


def test_pre_norm_is_the_last_layers_output_and_the_final_norm_gives_post(qwen3: Path) -> None:
    prompts = make_prompts(6)
    engine = make_engine(qwen3)
    [pre] = engine.capture(prompts, CaptureRequest((4,), "pre"), 0)
    [post] = engine.capture(prompts, CaptureRequest((4,), "post"), 0)
    assert torch.equal(pre.features["last_hidden_states"], pre.features["aux_hidden_states"][:, 0])
    hidden = pre.features["last_hidden_states"]
    weight = engine.frozen_weights(["norm.weight"])["norm.weight"]
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + engine.info.rms_norm_eps) * weight
    close(post.features["last_hidden_states"], normed)


def test_padding_changes_nothing_and_the_same_batch_gives_the_same_bits(directory: Path) -> None:
    engine = make_engine(directory)
    prompts = make_prompts(5, 17, 11)
    together = list(engine.capture(prompts, REQUEST, 0))
    again = list(engine.capture(prompts, REQUEST, 0))
    for index, prompt in enumerate(prompts):
        [alone] = engine.capture([prompt], REQUEST, 0)
        for name, tensor in together[index].features.items():
            assert torch.equal(tensor, again[index].features[name])
            close(tensor, alone.features[name])


def test_captured_tensors_own_their_memory_and_have_the_dtype_asked_for(qwen3: Path) -> None:
    request = CaptureRequest((1, 2), "post", dtype="bfloat16")
    samples = list(make_engine(qwen3).capture(make_prompts(5, 8), request, 0))
    for sample in samples:
        for name in ("aux_hidden_states", "last_hidden_states"):
            tensor = sample.features[name]
            assert tensor.dtype == torch.bfloat16
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert not samples[0].features["last_hidden_states"].requires_grad


def test_a_capture_leaves_no_hooks_behind_even_when_it_fails(qwen3: Path) -> None:
    engine = make_engine(qwen3)
    list(engine.capture(make_prompts(4), REQUEST, 0))
    model = engine._load()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "llama-tied", "mistral-sliding"])
def test_frozen_weights_are_the_models(kind: str, sharded: bool, tmp_path: Path) -> None:
    write_model(tmp_path, kind, **({"max_shard_size": "20KB"} if sharded else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = make_engine(tmp_path).frozen_weights(["lm_head.weight", "embed_tokens.weight", "norm.weight"])
    assert torch.equal(weights["embed_tokens.weight"], model.get_input_embeddings().weight)
    assert torch.equal(weights["lm_head.weight"], model.get_output_embeddings().weight)
    assert torch.equal(weights["norm.weight"], model.model.norm.weight)
    assert weights["lm_head.weight"].data_ptr() != weights["embed_tokens.weight"].data_ptr()
    bf16 = make_engine(tmp_path, dtype="bfloat16").frozen_weights(["norm.weight"])["norm.weight"]
    assert bf16.dtype == torch.bfloat16


def test_frozen_weights_that_would_mislead_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "gemma3")
    engine = make_engine(tmp_path)
    assert set(engine.frozen_weights(["lm_head.weight"])) == {"lm_head.weight"}
    with pytest.raises(TargetError, match="1 \\+ weight"):
        engine.frozen_weights(["norm.weight"])
    edit_config(tmp_path, final_logit_softcapping=30.0)
    with pytest.raises(TargetError, match="final_logit_softcapping"):
        make_engine(tmp_path).frozen_weights(["lm_head.weight"])
    with pytest.raises(TargetError, match="LayerNorm with a bias"):
        make_engine(write_model(tmp_path / "neox", "gpt-neox")).frozen_weights(["norm.weight"])
    with pytest.raises(TargetError, match="not a weight"):
        engine.frozen_weights(["q_proj.weight"])


def test_decoder_equals_the_full_forward_and_can_be_truncated(directory: Path) -> None:
    engine = make_engine(directory)
    [prompt] = make_prompts(14)
    token_ids = torch.tensor(prompt.input_ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        expected = model(token_ids[None]).logits[0]
    [sample] = engine.capture([prompt], REQUEST, 0)
    decoder = engine.decoder(REQUEST)
    first = decoder.forward(token_ids[:9])
    decoder.forward(torch.tensor([5, 6, 7]))  # wrong guesses
    decoder.truncate(9)
    decoder.truncate(9)
    steps = [first, decoder.forward(token_ids[9:10]), decoder.forward(token_ids[10:])]
    logits = torch.cat([step.logits for step in steps])
    assert logits.dtype == torch.float32
    close(logits, expected)
    for name in ("aux_hidden_states", "last_hidden_states"):
        close(torch.cat([step.features[name] for step in steps]), sample.features[name])
    with pytest.raises(ValueError):
        decoder.truncate(15)


def test_describe_reads_json_only() -> None:
    code = (
        "import sys, specforge_hf_target.plugin as p; [s] = p.specforge_target_engines(); "
        "assert s.name == 'hf'; print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_describe_gives_what_transformers_would(qwen3: Path) -> None:
    (qwen3 / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    info = make_engine(qwen3).info
    assert (info.architecture, info.num_layers, info.hidden_size, info.vocab_size) == ("Qwen3ForCausalLM", 5, 32, 96)
    assert (info.num_attention_heads, info.num_key_value_heads, info.head_dim) == (4, 2, 16)
    assert (info.dtype, info.bos_token_id, info.eos_token_ids) == ("float32", 1, (2, 5))
    assert info.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("written", "rope"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0},
        ),
        ({"rope_theta": 1e4, "rope_scaling": None}, {"rope_theta": 1e4, "rope_type": "default"}),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 3.0, "factor": 8.0}},
            {"rope_type": "llama3", "rope_theta": 3.0, "factor": 8.0},
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 1.0}}},
            {"rope_theta": 7.0, "rope_type": "default"},
        ),
    ],
)
def test_rope_of_both_generations_of_config_files(tmp_path: Path, written: dict, rope: dict) -> None:
    shape = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
    content = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", **shape, **written}
    (tmp_path / "config.json").write_text(json.dumps(content))
    info = make_engine(tmp_path).info
    assert info.rope_parameters == rope
    assert (info.dtype, info.head_dim, info.num_key_value_heads, info.eos_token_ids) == ("bfloat16", 8, 4, (2,))


def test_nested_language_model(tmp_path: Path) -> None:
    content = {"architectures": ["SomeVisionModel"], "dtype": "float16", "text_config": {**SHAPE, "head_dim": 64}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    info = make_engine(tmp_path).info
    assert (info.num_layers, info.head_dim, info.dtype) == (5, 64, "float16")


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    kept = {key: value for key, value in config.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(kept))


BROKEN = {
    "missing path": (lambda p: shutil.rmtree(p), lambda e: e.info, "no such directory"),
    "no config.json": (lambda p: (p / "config.json").unlink(), lambda e: e.info, "no config.json"),
    "config.json is not JSON": (
        lambda p: (p / "config.json").write_text("{"),
        lambda e: e.info,
        "not readable as JSON",
    ),
    "no architecture": (lambda p: edit_config(p, architectures=...), lambda e: e.info, "no architecture"),
    "no layers": (lambda p: edit_config(p, num_hidden_layers=...), lambda e: e.info, "num_hidden_layers is missing"),
    "odd layers": (lambda p: edit_config(p, num_hidden_layers="x"), lambda e: e.info, "not a positive integer"),
    "odd dtype": (lambda p: edit_config(p, dtype="float8"), lambda e: e.info, "dtype is 'float8'"),
    "no weights": (
        lambda p: (p / "model.safetensors").unlink(),
        lambda e: e.frozen_weights(["norm.weight"]),
        "neither model.safetensors",
    ),
    "truncated weights": (
        lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:100]),
        lambda e: e.frozen_weights(["norm.weight"]),
        "not readable as safetensors",
    ),
    "other model's weights": (
        lambda p: edit_config(p, vocab_size=128),
        lambda e: e.frozen_weights(["lm_head.weight"]),
        "of different models",
    ),
    "no weights to capture with": (
        lambda p: (p / "model.safetensors").unlink(),
        lambda e: list(e.capture(make_prompts(3), REQUEST, 0)),
        "neither model.safetensors",
    ),
    "a layer without weights": (
        lambda p: edit_config(p, num_hidden_layers=6, layer_types=["full_attention"] * 6),
        lambda e: list(e.capture(make_prompts(3), REQUEST, 0)),
        "lack 11 weights, model.layers.5.input_layernorm.weight among them",
    ),
    "unknown architecture": (
        lambda p: edit_config(p, model_type="nonesuch", architectures=["NoneSuchForCausalLM"]),
        lambda e: list(e.capture(make_prompts(3), REQUEST, 0)),
        "cannot load NoneSuchForCausalLM",
    ),
    "layer out of range": (
        lambda p: None,
        lambda e: list(e.capture(make_prompts(3), CaptureRequest((5,)), 0)),
        "layers are 0 to 4",
    ),
    "token id out of range": (
        lambda p: None,
        lambda e: list(e.capture([Prompt("p7", [1, 96], [0, 1])], REQUEST, 0)),
        "p7: vocabulary mismatch",
    ),
    "no tokenizer": (lambda p: None, lambda e: load_tokenizer(e._config), "tokenizer cannot be loaded"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_targets_say_what_is_wrong_and_what_to_do(case: str, qwen3: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen3, tmp_path / "model")
    break_it, use, message = BROKEN[case]
    break_it(tmp_path / "model")
    with pytest.raises(TargetError, match=message) as caught:
        use(make_engine(tmp_path / "model"))
    assert caught.value.hint
    assert caught.value.where


def test_a_device_that_is_not_there(qwen3: Path) -> None:
    make_engine(qwen3).health()
    with pytest.raises(TargetError, match="cannot be used"):
        make_engine(qwen3, device="cuda:77").health()


def test_the_home_of_nobody_is_refused() -> None:
    with pytest.raises(TargetError, match="cannot be looked at: Could not determine home directory"):
        HfTargetConfig(name="hf", path="~no-such-user/model").describe()


def test_hub_id_while_offline() -> None:
    with pytest.raises(TargetError, match="neither from the hub nor"):
        make_engine(Path("nobody/nothing")).info  # noqa: B018


def test_tokenizer_renders_encodes_and_has_a_fingerprint(tiny_model, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(HfTargetConfig(name="hf", path=str(tiny_model.path)))
    messages = [{"role": "user", "content": "grüße 👋"}]
    text = tokenizer.render(messages, add_generation_prompt=True).text
    assert text == "<|im_start|>user\ngrüße 👋<|im_end|>\n<|im_start|>assistant\n"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.input_ids) == text
    assert encoded.tokens_between(len(text) - 1, len(text)) == (len(encoded.input_ids) - 1, len(encoded.input_ids))
    assert encoded.input_ids[0] in tokenizer.special_token_ids
    assert tokenizer.render(messages, add_generation_prompt=True).marked is None
    other = tmp_path / "other"
    shutil.copytree(tiny_model.path, other)
    assert load_tokenizer(HfTargetConfig(name="hf", path=str(other))).fingerprint == tokenizer.fingerprint
    for path in other.glob("chat_template*"):
        path.unlink()
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    bare = load_tokenizer(HfTargetConfig(name="hf", path=str(other)))
    assert bare.fingerprint != tokenizer.fingerprint
    with pytest.raises(DataError, match="no chat template") as caught:
        bare.render(messages, add_generation_prompt=False)
    assert str(other) in caught.value.where


def test_slow_tokenizers_are_refused(qwen3: Path) -> None:
    from specforge_hf_target.tokenizer import HfChatTokenizer

    class Slow:
        is_fast = False

    with pytest.raises(TargetError, match="slow"):
        HfChatTokenizer(Slow(), "target.path x")
