# SPDX-License-Identifier: Apache-2.0
"""Targets that are not there, or not what they say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from bad_input import BadInput, Workshop, cut

Damage = Callable[[Path], object]


def _capture(damage: Damage):
    """`capture` of a run on a copy of the model that was damaged."""
    return _command("capture", damage)


def _command(command: str, damage: Damage):
    def spoil(w: Workshop) -> Sequence[str]:
        damage(w.target())
        return [command, w.run_on_target()]

    return spoil


def _config(**values: object):
    """`plan` of a run on a copy of the model whose config.json was changed."""

    def spoil(w: Workshop) -> Sequence[str]:
        w.target(**values)
        return ["plan", w.run_on_target()]

    return spoil


def _capture_config(**values: object):
    def spoil(w: Workshop) -> Sequence[str]:
        w.target(**values)
        return ["capture", w.run_on_target()]

    return spoil


def _generation(text: str):
    return _command("plan", lambda target: (target / "generation_config.json").write_text(text))


def _path(path: str, *more: str):
    return lambda w: ["plan", w.run_file(target={"path": path}), *more]


def _train_without_weights(w: Workshop) -> Sequence[str]:
    (w.finished() / "checkpoints").rename(w.root / "former")
    target = w.target()
    (target / "model.safetensors").unlink()
    features = w.root / "run" / "features"
    for split in ("train", "eval"):
        path = features / split / "features.json"
        manifest = json.loads(path.read_text())
        manifest["target"]["name_or_path"] = "target"
        path.write_text(json.dumps(manifest))
    return ["train", w.run_on_target()]


def _index(target: Path) -> None:
    (target / "model.safetensors").unlink()
    names = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001.safetensors"}}
    (target / "model.safetensors.index.json").write_text(json.dumps(names))


def _index_leaves(target: Path) -> None:
    (target / "model.safetensors").rename(target.parent / "elsewhere.safetensors")
    names = {"metadata": {}, "weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (target / "model.safetensors.index.json").write_text(json.dumps(names))


def _only_a_bin(target: Path) -> None:
    (target / "model.safetensors").rename(target / "pytorch_model.bin")


def _tokenizer(target: Path) -> None:
    for path in target.glob("*token*"):
        path.unlink()


def _template(target: Path) -> None:
    (target / "chat_template.jinja").unlink()


_RECURSION = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"

TABLE = [
    BadInput("target missing", _path("/nowhere/model"), ("run.yaml: target", "target.path /nowhere/model", "correct")),
    BadInput(
        "target neither here nor on the hub",
        _path("nobody/nothing"),
        ("target.path nobody/nothing", "hub", "correct the path"),
    ),
    BadInput(
        "target is a file",
        lambda w: ["plan", w.run_file(target={"path": w.write("model.gguf", "x")})],
        ("target.path model.gguf", "is not a directory", "name the model's directory"),
    ),
    BadInput(
        "target without config.json",
        _command("plan", lambda target: (target / "config.json").unlink()),
        ("run.yaml: target", "target.path target", "no config.json", "name the directory"),
    ),
    BadInput(
        "config.json is no JSON",
        _command("plan", lambda target: cut(target / "config.json")),
        ("target/config.json", "not readable as JSON", "copy the model again"),
    ),
    BadInput(
        "config.json is a list",
        _command("plan", lambda target: (target / "config.json").write_text("[]")),
        ("target/config.json", "not a JSON object"),
    ),
    BadInput("config.json lacks a size", _config(hidden_size=None), ("target/config.json", "hidden_size is missing")),
    BadInput(
        "config.json has text for a size",
        _config(num_hidden_layers="six"),
        ("target/config.json: num_hidden_layers", "'six' is not a positive integer", "correct the file"),
    ),
    BadInput(
        "config.json has text for a number",
        _config(rms_norm_eps="small"),
        ("config.json: rms_norm_eps", "'small'", "correct"),
    ),
    BadInput(
        "config.json has a list for RoPE", _config(rope_parameters=[1]), ("config.json: rope_parameters", "correct")
    ),
    BadInput(
        "end token that is text",
        _generation('{"eos_token_id": "end"}'),
        ("generation_config.json", "token ids are 'end'"),
    ),
    BadInput("generation_config.json is no JSON", _generation("{"), ("generation_config.json", "not readable as JSON")),
    BadInput(
        "config.json nested without end",
        _command("plan", lambda target: (target / "config.json").write_text("[" * 100_000)),
        ("target/config.json", "not readable as JSON", "nested", "copy the model again"),
    ),
    BadInput(
        "config.json claims a size that no machine has",
        _config(hidden_size=10**9),
        ("target/config.json: hidden_size", "1000000000 is more than", "correct the file"),
    ),
    BadInput(
        "config.json claims more than the weights hold",
        _capture_config(intermediate_size=10**6),
        ("target target", "describes 576,", "different models"),
    ),
    BadInput(
        "config.json asks for a kernel of somebody's",
        _config(attn_implementation="somebody/kernel"),
        ("target/config.json: attn_implementation", "'somebody/kernel'", "remove the key"),
    ),
    BadInput(
        "RoPE of a number that is none",
        _config(rope_parameters={"rope_theta": [1]}),
        ("target/config.json: rope_parameters.rope_theta", "[1] is not a number", "correct the file"),
    ),
    BadInput("target with an encoder", _config(is_encoder_decoder=True), ("target/config.json", "encoder-decoder")),
    BadInput("target in fp8", _config(dtype="float8_e4m3fn"), ("config.json", "float8_e4m3fn", "set target.dtype")),
    BadInput(
        "architecture unknown",
        _capture_config(architectures=["NovelForCausalLM"], model_type="novel"),
        ("target target", "cannot load NovelForCausalLM", "update transformers"),
    ),
    BadInput(
        "target without weights",
        _capture(lambda target: (target / "model.safetensors").unlink()),
        ("target target", "neither model.safetensors", "save_pretrained it again"),
    ),
    BadInput(
        "weights cut short",
        _capture(lambda target: cut(target / "model.safetensors")),
        ("target target", "cannot load Qwen3ForCausalLM", "check its files"),
    ),
    BadInput(
        "weights of another shape",
        _capture_config(intermediate_size=128),
        ("target target", "down_proj", "[32, 64]", "different models"),
    ),
    BadInput(
        "weights incomplete",
        _capture_config(num_hidden_layers=8, layer_types=None),
        ("target target", "weights", "incomplete"),
    ),
    BadInput(
        "config.json at odds with itself",
        _capture_config(num_hidden_layers=8),
        ("target.path target", "contradicts itself", "num_hidden_layers", "copy"),
    ),
    BadInput(
        "weight index that leaves the model",
        _capture(_index_leaves),
        ("model.safetensors.index.json: weight_map", "'../elsewhere.safetensors'", "copy it again"),
    ),
    BadInput(
        "weights in a format that is not read",
        _capture(_only_a_bin),
        ("target target", "neither model.safetensors", "save_pretrained it again"),
    ),
    BadInput("file of the weight index missing", _capture(_index), ("target target", "model-00001.safetensors")),
    BadInput(
        "training without the target's weights", _train_without_weights, ("target", "safetensors", "save_pretrained")
    ),
    BadInput(
        "target without tokenizer",
        _capture(_tokenizer),
        ("target.path target", "tokenizer cannot be loaded", "put the model's tokenizer.json"),
    ),
    BadInput(
        "tokenizer without chat template",
        _capture(_template),
        (".jsonl:1", "target.path target", "no chat template", "add chat_template.jinja"),
    ),
    BadInput(
        "template divides by zero",
        _capture(lambda target: (target / "chat_template.jinja").write_text("{{ 1 / 0 }}")),
        (".jsonl:1", "the chat template refuses the conversation", "division by zero"),
    ),
    BadInput(
        "template calls itself for ever",
        _capture(lambda target: (target / "chat_template.jinja").write_text(_RECURSION)),
        (".jsonl:1", "the chat template refuses the conversation", "recursion"),
    ),
    BadInput(
        "tokenizer is no JSON",
        _capture(lambda target: cut(target / "tokenizer.json")),
        ("target.path target", "tokenizer cannot be loaded", "put the model's tokenizer.json"),
    ),
    BadInput(
        "target is an adapter",
        _capture(lambda target: (target / "adapter_config.json").write_text("{}")),
        ("target target: adapter_config.json", "an adapter", "merge it"),
    ),
    BadInput(
        "RoPE that is told a text",
        _config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "long_factor": ["x"]}),
        ("target/config.json: rope_parameters.long_factor", "['x'] is nothing that a RoPE is told", "correct the file"),
    ),
]
