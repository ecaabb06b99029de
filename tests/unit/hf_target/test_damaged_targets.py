# SPDX-License-Identifier: Apache-2.0
"""Targets that are damaged or hostile: an error that names the file, no code run, nothing unpickled, little memory."""

from __future__ import annotations

import json
import os
import pickle
import pty
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from specforge_core.contracts import CaptureRequest, Prompt, TargetError
from specforge_hf_target.config import HfTargetConfig
from specforge_hf_target.engine import HfTargetEngine
from specforge_hf_target.tokenizer import load_tokenizer

PROMPT = Prompt("p", [1, 2, 3], [0, 1, 1])
NAMES = ["embed_tokens.weight", "lm_head.weight"]
FAR_TOO_LARGE = 1 << 30  # transformers itself maps some hundred MB when it is first used


@pytest.fixture
def target(tiny_model, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model.path, tmp_path / "target")


def config_of(target: Path, **settings) -> HfTargetConfig:
    return HfTargetConfig(name="hf", path=str(target), **settings)


def engine_of(target: Path) -> HfTargetEngine:
    return HfTargetEngine(config_of(target))


def capture(target: Path) -> None:
    list(engine_of(target).capture([PROMPT], CaptureRequest((0,), "post"), 0))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@contextmanager
def little_memory() -> Iterator[None]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + FAR_TOO_LARGE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def refuse(act, *arguments) -> TargetError:
    with little_memory(), pytest.raises(TargetError) as refused:
        act(*arguments)
    assert len(str(refused.value)) < 1000
    assert refused.value.where
    assert refused.value.hint
    return refused.value


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size", "head_dim")


@pytest.mark.parametrize("key", [*SIZES, "num_key_value_heads", "max_position_embeddings"])
@pytest.mark.parametrize("value", [[1], {}, "many", True, 0, -1, 2.5, 1e308, 10**9, 10**400, float("nan")], ids=repr)
def test_a_size_that_is_none_is_named(target, key, value):
    change(target / "config.json", **{key: value})
    assert refuse(config_of(target).describe).where == f"{target / 'config.json'}: {key}"


WRONG = [
    ("rms_norm_eps", ["small", [1], True, 0, -1.0, 1e308, float("nan"), float("inf")]),
    ("rope_parameters", [[1], "x", 7, {"rope_type": [1]}, {"rope_type": 3}, {"rope_theta": 0}, {"rope_theta": "x"}]),
    ("rope_parameters", [{"rope_theta": float("nan")}, {"rope_theta": 10**400}, {"factor": [1]}, {"factor": -1}]),
    ("rope_scaling", [[1], "x", 7]),
    ("rope_parameters", [{"long_factor": [1.0, "x"]}, {"low_freq_factor": "x"}, {"beta_fast": 1e400}, {"a": [[1]]}]),
    ("text_config", [[1], "qwen3", 7]),
    ("dtype", [[1], {"a": 1}, 7, "float8_e4m3fn", "x" * 10**6]),
    ("eos_token_id", [-5, 10**30, "x", [[1]], {"a": 1}, 2.5, [True]]),
    ("bos_token_id", [-5, 10**30, "x", [[1]], {"a": 1}, 2.5, True]),
    ("architectures", ["x", ["\x1b[2JQwen3ForCausalLM"], [], [1], {}, None]),
    ("num_labels", [10**9]),
    ("num_experts", [10**9]),
    ("attn_implementation", ["attacker/kernel", ["x"], {"": "attacker/kernel"}]),
    ("_attn_implementation", ["attacker/kernel@main:x"]),
    ("transformers_weights", ["adapter_model.bin", "../other.safetensors"]),
]


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG for value in values])
def test_a_field_of_another_kind_is_named(target, key, value):
    (target / "generation_config.json").unlink()
    change(target / "config.json", **{"rope_parameters": None, key: value})
    where = refuse(config_of(target).describe).where
    assert where.startswith(str(target))
    assert key in where or "config.json" in where or "token" in key


def test_more_heads_than_there_is_room_for_are_refused(target):
    change(target / "config.json", head_dim=None, num_attention_heads=33)
    assert refuse(config_of(target).describe).where.endswith("num_attention_heads")


def test_an_adapter_is_refused_because_it_names_what_else_to_load(target):
    (target / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    assert refuse(capture, target).where.endswith("adapter_config.json")


def test_what_only_the_forward_pass_finds_is_said(target):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 2}
    change(target / "config.json", rope_parameters={**rope, "short_factor": [1.0] * 4, "long_factor": [1.0] * 3})
    message = refuse(capture, target).message
    assert "Qwen3ForCausalLM cannot be run" in message
    decoder = engine_of(target).decoder(CaptureRequest((0,), "post"))
    assert "Qwen3ForCausalLM cannot be run" in refuse(decoder.forward, torch.tensor([1, 2, 3])).message


@pytest.mark.parametrize("path", ["~nobody-of-this-name/model", "a" * 5000, "nul\0byte", "a/" + "b" * 300])
def test_a_path_that_cannot_be_looked_at_is_said(path):
    refuse(HfTargetConfig(name="hf", path=path).describe)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"", b"[", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"[]", b"7"], ids=repr)
def test_a_json_file_that_is_none_is_named(target, name, content):
    if name == "model.safetensors.index.json":
        (target / "model.safetensors").unlink()
    (target / name).write_bytes(content)

    def describe_and_read() -> None:
        config_of(target).describe()
        engine_of(target).frozen_weights(NAMES)

    assert str(target / name) in refuse(describe_and_read).where


def test_a_config_that_never_ends_is_not_read(target):
    with (target / "config.json").open("r+b") as file:
        file.truncate(1 << 40)
    assert "longer than" in refuse(config_of(target).describe).message
    (target / "config.json").unlink()
    os.mkfifo(target / "config.json")
    assert "no config.json" in refuse(config_of(target).describe).message


def test_links_are_what_a_hub_cache_is_made_of(target, tmp_path):
    blobs = tmp_path / "blobs"
    target.rename(blobs)
    target.mkdir()
    for number, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / f"{number:x}")
        (target / path.name).symlink_to(f"../blobs/{number:x}")
    capture(target)
    engine_of(target).frozen_weights(NAMES)
    load_tokenizer(config_of(target)).encode("x")


def shard(target: Path, name: str) -> None:
    """The weights behind an index that says they are in the file of this name."""
    keys = load_file(target / "model.safetensors").keys()
    (target / "model.safetensors").rename(target.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


LEAVING = ["../elsewhere.safetensors", "a/../../elsewhere.safetensors", "./../elsewhere.safetensors", "..", "", "."]


@pytest.mark.parametrize("name", [*LEAVING, "ABSOLUTE", "weights.bin", "x.safetensors\n", 7, None, ["x"], {}], ids=repr)
def test_an_index_names_safetensors_below_the_models_directory_only(target, name):
    shard(target, str(target.parent / "elsewhere.safetensors") if name == "ABSOLUTE" else name)
    assert "model.safetensors.index.json: weight_map" in refuse(capture, target).where
    assert "model.safetensors.index.json: weight_map" in refuse(engine_of(target).frozen_weights, NAMES).where


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("index", [False, True])
def test_weights_in_another_format_are_not_unpickled(target, tmp_path, index):
    weights = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    torch.save({**weights, "trap": Trap(tmp_path / "sprung")}, target / "pytorch_model.bin")
    (target / "model.pkl").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    if index:
        names = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
        (target / "pytorch_model.bin.index.json").write_text(json.dumps(names))
    for act in (lambda: capture(target), lambda: engine_of(target).frozen_weights(NAMES)):
        assert "neither model.safetensors" in refuse(act).message
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "head_dim"])
def test_sizes_are_compared_with_the_files_before_memory_is_taken(target, key):
    change(target / "config.json", **{key: 60_000})
    refuse(capture, target)
    change(target / "config.json", **{key: 10**7})
    refuse(capture, target)
    refuse(engine_of(target).frozen_weights, NAMES)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": [1]},
        {"model_type": "nonesuch"},
        {"id2label": [1]},
        {"quantization_config": [1]},
        {"text_config": [1]},
        {"pad_token_id": 10**9},
        {"tie_word_embeddings": "yes"},
        {"hidden_act": "nonesuch"},
        {"layer_types": "full_attention"},
        {"sliding_window": "wide", "use_sliding_window": True},
        {"initializer_range": [1]},
    ],
    ids=str,
)
def test_whatever_transformers_raises_over_a_config_is_said(target, changes):
    change(target / "config.json", **changes)
    assert "target" in refuse(capture, target).where


@pytest.mark.parametrize("value", ["yes", 1, [1], {"a": 1}, 0.0], ids=repr)
def test_tied_or_not_is_true_or_false(target, value):
    change(target / "config.json", tie_word_embeddings=value)
    assert "tie_word_embeddings" in refuse(engine_of(target).frozen_weights, NAMES).where


@pytest.mark.parametrize(
    "spoil",
    [
        lambda weight: weight[:-1].clone(),
        lambda weight: weight.flatten().clone(),
        lambda weight: weight.to(torch.int64),
        lambda weight: weight.to(torch.bool),
        lambda weight: weight.to(torch.float8_e4m3fn),
    ],
)
def test_frozen_weights_of_another_kind_are_refused(target, spoil):
    weights = load_file(target / "model.safetensors")
    save_file({**weights, "lm_head.weight": spoil(weights["lm_head.weight"])}, target / "model.safetensors")
    assert "lm_head.weight is" in refuse(engine_of(target).frozen_weights, NAMES).message


# Run in a process of its own on a terminal, where transformers would ask whether code may run.
USE = """
import sys
from specforge_core.contracts import CaptureRequest, Prompt, SpecForgeError
from specforge_hf_target.config import HfTargetConfig
from specforge_hf_target.engine import HfTargetEngine
from specforge_hf_target.tokenizer import load_tokenizer
config = HfTargetConfig(name="hf", path=sys.argv[1])
for act in (lambda: load_tokenizer(config),
            lambda: list(HfTargetEngine(config).capture([Prompt("p", [1, 2], [0, 1])], CaptureRequest((0,)), 0))):
    try:
        act()
    except SpecForgeError as error:
        print("REFUSED", error)
print("DONE")
"""


@pytest.mark.parametrize("known", [True, False])
def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(target, tmp_path, known):
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Trap: pass\n"
    (target / "trap.py").write_text(trap)
    (target / "custom_generate").mkdir()
    (target / "custom_generate" / "generate.py").write_text(trap)
    names = {
        "AutoConfig": "trap.Trap",
        "AutoModelForCausalLM": "trap.Trap",
        "AutoTokenizer": ["trap.Trap", "trap.Trap"],
    }
    change(target / "config.json", auto_map=names, **({} if known else {"model_type": "novel"}))
    change(target / "tokenizer_config.json", auto_map=names, **({} if known else {"tokenizer_class": "Trap"}))
    leader, follower = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", USE, str(target)], stdin=follower, capture_output=True, text=True, timeout=120
    )
    os.close(leader), os.close(follower)
    assert done.stdout.splitlines()[-1:] == ["DONE"], done.stderr
    assert ("REFUSED" in done.stdout) is not known
    assert "[y/N]" not in done.stdout + done.stderr
    assert not (tmp_path / "sprung").exists()


TOKENIZER_FILES = [
    ("tokenizer_config.json", {"tokenizer_class": "os.system"}),
    ("tokenizer_config.json", {"tokenizer_class": ["x"]}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
    ("tokenizer_config.json", {"extra_special_tokens": 7}),
    ("tokenizer_config.json", {"chat_template": 7}),
    ("tokenizer.json", {"model": None}),
    ("tokenizer.json", {"added_tokens": [{"id": -1}]}),
    ("tokenizer.json", {"pre_tokenizer": {"type": "Nonesuch"}}),
    ("tokenizer.json", {"truncation": [1]}),
]


@pytest.mark.parametrize(("name", "changes"), TOKENIZER_FILES, ids=str)
def test_tokenizer_files_of_wrong_kinds_are_said_or_make_no_difference(target, name, changes):
    change(target / name, **changes)
    try:
        tokenizer = load_tokenizer(config_of(target))
        tokenizer.encode("the draft")
        tokenizer.render([{"role": "user", "content": "x"}], add_generation_prompt=False)
    except TargetError as error:
        where = error.where
        assert str(target) in where


def test_a_panic_in_the_tokenizer_is_said(target):
    content = json.loads((target / "tokenizer.json").read_text())
    content["model"]["continuing_subword_prefix"] = "x" * 1000
    (target / "tokenizer.json").write_text(json.dumps(content))
    assert "tokenizer cannot be loaded" in refuse(load_tokenizer, config_of(target)).message


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"[]", b"null"], ids=repr)
def test_tokenizer_files_that_are_no_json_are_said(target, name, content):
    (target / name).write_bytes(content)
    assert str(target) in refuse(load_tokenizer, config_of(target)).where


def test_a_tokenizer_file_that_never_ends_is_not_read(target):
    with (target / "tokenizer.json").open("r+b") as file:
        file.truncate(1 << 40)
    assert refuse(load_tokenizer, config_of(target)).where == str(target / "tokenizer.json")
