# SPDX-License-Identifier: Apache-2.0
"""Somebody can write into the run's shared directory and has no token: what he puts there is never trained."""

from __future__ import annotations

import json
import secrets
import struct
from pathlib import Path

import pytest
from command_line import Specforge, make_run_file
from specforge_core.contracts import PartContext
from specforge_core.features.file_channel import FileChannel
from specforge_core.hooks.builtin import FileChannelConfig
from specforge_core.testing.samples import make_ref
from tiny_model import TinyModel
from xxhash import xxh3_64

pytestmark = pytest.mark.timeout(300)


def write_run(tiny_model: TinyModel, directory: Path, **changes: object) -> str:
    token = directory / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    run = {"directory": str(directory / "run"), "id": "r", "seed": 3, "token_file": str(token)}
    return str(make_run_file(tiny_model, directory / "run.yaml", run=run, training={"epochs": 1}, **changes))


def substitute(path: Path) -> None:
    """Other hidden states in a sample file: same names and shapes, the file's own checksum right."""
    data = path.read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    begin, end = header["aux_hidden_states"]["data_offsets"]
    body[begin:end] = struct.pack("<f", 0.5) * ((end - begin) // 4)
    header["__metadata__"]["checksum"] = xxh3_64(bytes(body)).hexdigest()
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(data[:8] + text + bytes(body))


def steps(directory: Path) -> int:
    log = directory / "run" / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_offline_features_that_somebody_replaced_are_not_trained(
    tiny_model: TinyModel, tmp_path: Path, specforge: Specforge
) -> None:
    run = write_run(tiny_model, tmp_path)
    assert specforge("capture", run).returncode == 0
    [path, *_] = sorted((tmp_path / "run" / "features" / "train" / "store").rglob("*.safetensors"))
    substitute(path)
    done = specforge("train", run)
    assert done.returncode == 2
    assert f"sample {path.stem} " in done.stderr
    assert "not the ones that were signed" in done.stderr
    assert "Traceback" not in done.stderr
    assert steps(tmp_path) < 3


def test_a_strangers_refs_are_passed_over_and_the_run_goes_on(
    tiny_model: TinyModel, tmp_path: Path, specforge: Specforge
) -> None:
    places = {"store": "features", "channel": "refs"}
    wires = {part: {"name": "file", "path": str(tmp_path / place)} for part, place in places.items()}
    run = write_run(tiny_model, tmp_path, topology="disaggregated", data={"eval": []}, **wires)
    context = PartContext(run_id="r", directory=tmp_path)
    stranger = FileChannel(FileChannelConfig(name="file", path=tmp_path / "refs"), context).writer("stranger")
    stranger.publish([make_ref(number) for number in range(40)])
    stranger.close()
    done = specforge("run", run)
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path) == 3
    assert "stranger.refs, offset" in done.stderr
    assert "is not signed" in done.stderr
