# SPDX-License-Identifier: Apache-2.0
"""Exports that are damaged or hostile end as ExportError, soon and in little memory, whatever their files say."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from dflash_cases import TARGET, make_strategy
from safetensors.torch import load_file, save_file
from specforge_core.contracts import ExportError
from specforge_eagle3.config import Eagle3Config
from specforge_eagle3.strategy import Eagle3Strategy

EAGLE3 = {"draft_vocab_size": 40, "ttt_steps": 4, "aux_layer_ids": [0, 5, 9]}
KINDS = [
    ("eagle3", "sglang"),
    ("eagle3", "speculators"),
    ("dflash", "sglang"),
    ("dflash", "speculators"),
    ("domino", "sglang"),
]
WRONG = [
    *(None, [], [1], {}, {"a": [1]}, "word", True, 0, -1, 3, 2.5, 1e308, 10**7, 10**9, 10**400, float("nan")),
    *([[]], [-1], ["x"], [10**9] * 3, list(range(5000)), "x" * 10**6),
]
FAR_TOO_LARGE = 400 << 20


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(kind))
def honest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, Path]:
    """A strategy and an export of it that loads."""
    name, format = request.param
    strategy = (
        Eagle3Strategy(Eagle3Config(**EAGLE3)) if name == "eagle3" else make_strategy(name, {"sliding_window": 6})
    )
    directory = tmp_path_factory.mktemp(name)
    strategy.export(strategy.build_draft(TARGET), directory, format=format, target=TARGET.info)
    strategy.load_export(directory, TARGET)
    return strategy, directory


@pytest.fixture
def damaged(honest, tmp_path) -> tuple[object, Path]:
    strategy, directory = honest
    return strategy, shutil.copytree(directory, tmp_path / "export")


@contextmanager
def little_memory() -> Iterator[None]:
    """Any large allocation fails inside, with an error that is not the product's."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + FAR_TOO_LARGE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def refuse(strategy, directory: Path) -> ExportError:
    with little_memory(), pytest.raises(ExportError) as refused:
        strategy.load_export(directory, TARGET)
    assert len(str(refused.value)) < 1000
    assert refused.value.where
    assert refused.value.hint
    return refused.value


def leaves(config: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key, sections' too."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield (*path, key)
            yield from leaves(value, (*path, key))


def replaced(config: dict, path: tuple[str, ...], value: object) -> dict:
    changed = copy.deepcopy(config)
    section = changed
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    return changed


def write(directory: Path, config: object) -> None:
    (directory / "config.json").write_text(json.dumps(config))


def test_every_field_of_every_wrong_kind_is_refused_or_makes_no_difference(damaged):
    strategy, directory = damaged
    config, refusals = json.loads((directory / "config.json").read_text()), []
    for path in leaves(config):
        for value in WRONG:
            write(directory, replaced(config, path, value))
            try:
                with little_memory():
                    strategy.load_export(directory, TARGET)
            except ExportError as error:
                refusals.append(error)
    assert len(refusals) > 200
    assert all(str(directory) in error.where and error.hint and len(str(error)) < 1000 for error in refusals)


@pytest.mark.parametrize("value", [[1], "wide", True, 0, -8, 2.5, 1e9, 10**12], ids=str)
def test_a_field_that_sizes_follow_from_is_named(damaged, value):
    strategy, directory = damaged
    config = json.loads((directory / "config.json").read_text())
    section = ("transformer_layer_config",) if "transformer_layer_config" in config else ()
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        write(directory, replaced(config, (*section, key), value))
        assert refuse(strategy, directory).where == f"{directory / 'config.json'}: {key}"


def test_sizes_that_no_machine_has_are_compared_before_memory_is_taken(damaged):
    strategy, directory = damaged
    config = json.loads((directory / "config.json").read_text())
    section = ("transformer_layer_config",) if "transformer_layer_config" in config else ()
    for key in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "head_dim"):
        write(directory, replaced(config, (*section, key), 10**7))
        refuse(strategy, directory)


ROPE = [
    {"rope_type": "longrope"},
    {"rope_type": ["yarn"]},
    {"rope_theta": 0},
    {"rope_theta": -1e4},
    {"rope_theta": 1},
    {"rope_theta": "large"},
    {"rope_theta": True},
    {"rope_theta": 10**400},
    {"rope_theta": float("nan")},
    {"rope_type": "linear"},
    {"rope_type": "linear", "factor": 0},
    {"rope_type": "linear", "factor": [2]},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": -64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 0},
    {"rope_type": "yarn", "factor": float("inf"), "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
    {"partial_rotary_factor": 0.5},
]


@pytest.mark.parametrize("rope", ROPE, ids=str)
def test_rope_that_is_unknown_or_no_rotation_is_refused(damaged, rope):
    strategy, directory = damaged
    config = json.loads((directory / "config.json").read_text())
    section = ("transformer_layer_config",) if "transformer_layer_config" in config else ()
    write(directory, replaced(config, (*section, "rope_parameters"), {"rope_theta": 1e4, **rope}))
    assert refuse(strategy, directory).where == f"{directory / 'config.json'}: rope_parameters"


def test_heads_that_do_not_divide_are_refused(damaged):
    strategy, directory = damaged
    config = json.loads((directory / "config.json").read_text())
    section = ("transformer_layer_config",) if "transformer_layer_config" in config else ()
    for key, value, named in (("num_key_value_heads", 3, "num_key_value_heads"), ("head_dim", 7, "head_dim")):
        write(directory, replaced(config, (*section, key), value))
        assert named in refuse(strategy, directory).where


def plant_pipe(directory: Path, name: str) -> None:
    (directory / name).unlink()
    os.mkfifo(directory / name)


def plant_directory(directory: Path, name: str) -> None:
    (directory / name).unlink()
    (directory / name).mkdir()


def plant_device(directory: Path, name: str) -> None:
    (directory / name).unlink()
    (directory / name).symlink_to("/dev/zero")


def plant_circle(directory: Path, name: str) -> None:
    (directory / name).unlink()
    (directory / name).symlink_to(directory / name)


def test_files_that_are_links_into_a_cache_are_read(damaged):
    strategy, directory = damaged
    expected = strategy.load_export(directory, TARGET).state_dict()
    for name in ("config.json", "model.safetensors"):
        (directory / name).rename(directory / f"blob of {name}")
        (directory / name).symlink_to(directory / f"blob of {name}")
    found = strategy.load_export(directory, TARGET).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("plant", [plant_pipe, plant_directory, plant_device, plant_circle])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(damaged, name, plant):
    strategy, directory = damaged
    plant(directory, name)
    assert refuse(strategy, directory).where == str(directory / name)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"7", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"\0" * 100],
    ids=lambda content: repr(content[:8]),
)
def test_a_config_that_is_no_json_object_is_refused(damaged, content):
    strategy, directory = damaged
    (directory / "config.json").write_bytes(content)
    assert refuse(strategy, directory).where == str(directory / "config.json")


def test_a_huge_config_is_not_read(damaged):
    strategy, directory = damaged
    with (directory / "config.json").open("r+b") as file:
        file.truncate(1 << 40)
    assert "longer than" in refuse(strategy, directory).message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 1 << 60),
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", (1 << 64) - 1) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 66) + b'{"fc.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[0,9999]}}',
    ],
    ids=lambda content: repr(content[:12]),
)
def test_weights_that_are_no_safetensors_are_refused(damaged, content):
    strategy, directory = damaged
    (directory / "model.safetensors").write_bytes(content)
    assert refuse(strategy, directory).where == str(directory / "model.safetensors")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_weights_that_were_cut_short_are_refused(damaged, share):
    strategy, directory = damaged
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "unreadable" in refuse(strategy, directory).message


def spoilt(directory: Path, name: str, tensor: torch.Tensor) -> None:
    path = directory / "model.safetensors"
    save_file({**load_file(path), name: tensor}, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.to(torch.int64),
        lambda weight: weight.to(torch.bool),
        lambda weight: weight.to(torch.float8_e4m3fn),
        lambda weight: weight.double(),
        lambda weight: weight[:-1].clone(),
        lambda weight: weight[None].clone(),
        lambda weight: weight.flatten().clone(),
        lambda weight: torch.full_like(weight, float("nan")),
        lambda weight: torch.full_like(weight, float("-inf")),
    ],
)
def test_every_weight_of_another_kind_is_named(damaged, change):
    strategy, directory = damaged
    weights = load_file(directory / "model.safetensors")
    for name in ("fc.weight", next(name for name in weights if "q_proj" in name)):
        save_file({**weights, name: change(weights[name])}, directory / "model.safetensors")
        error = refuse(strategy, directory)
        assert error.where == str(directory / "model.safetensors")
        assert name.split(".")[-2] in error.message


def test_a_draft_for_another_number_of_captured_layers_is_refused(honest):
    strategy, directory = honest
    fewer = type(strategy)(strategy.config.model_copy(update={"aux_layer_ids": (1,)}))
    with pytest.raises(ExportError, match=r"captured layers, strategy\.aux_layer_ids gives 1"):
        fewer.load_export(directory, TARGET)


@pytest.fixture
def eagle3(tmp_path) -> tuple[Eagle3Strategy, Path]:
    strategy = Eagle3Strategy(Eagle3Config(**EAGLE3))
    strategy.export(strategy.build_draft(TARGET), tmp_path, format="sglang", target=TARGET.info)
    return strategy, tmp_path


@pytest.mark.parametrize("value", [-1, 40, 10**6, 2**63 - 1, -(2**63)])
def test_a_vocabulary_map_that_leaves_the_vocabulary_is_refused(eagle3, value):
    strategy, directory = eagle3
    d2t = load_file(directory / "model.safetensors")["d2t"]
    d2t[-1] = value
    spoilt(directory, "d2t", d2t)
    assert "draft vocabulary" in refuse(strategy, directory).message


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.uint8])
def test_a_vocabulary_map_of_other_numbers_is_refused(eagle3, dtype):
    strategy, directory = eagle3
    spoilt(directory, "d2t", load_file(directory / "model.safetensors")["d2t"].to(dtype))
    assert "d2t" in refuse(strategy, directory).message


def test_a_draft_vocabulary_larger_than_the_targets_is_refused(eagle3):
    strategy, directory = eagle3
    config = json.loads((directory / "config.json").read_text())
    write(directory, {**config, "draft_vocab_size": TARGET.info.vocab_size + 1})
    assert "draft_vocab_size" in refuse(strategy, directory).where


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_size", 1),
        ("block_size", 10**6),
        ("layer_types", ["full_attention"]),
        ("layer_types", ["linear_attention"] * 2),
        ("layer_types", [["full_attention"]] * 2),
        ("layer_types", "full_attention"),
        ("num_hidden_layers", 10**6),
        ("sliding_window", None),
        ("sliding_window", 0),
        ("mask_token_id", 67),
        ("mask_token_id", -1),
        ("target_layer_ids", []),
        ("target_layer_ids", [1.0, 9.0]),
        ("projector_type", ["domino"]),
    ],
)
def test_a_block_draft_that_cannot_be_is_refused(tmp_path, key, value):
    strategy = make_strategy("dflash", {"sliding_window": 6})
    strategy.export(strategy.build_draft(TARGET), tmp_path, format="sglang", target=TARGET.info)
    config = json.loads((tmp_path / "config.json").read_text())
    own = key in ("mask_token_id", "target_layer_ids", "projector_type")
    write(tmp_path, replaced(config, ("dflash_config", key) if own else (key,), value))
    assert key in refuse(strategy, tmp_path).where
