# SPDX-License-Identifier: Apache-2.0
"""DFlash and Domino through the whole path with real parts, offline and colocated; decoding is lossless."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command_line import Specforge, make_run_file
from tiny_model import TinyModel

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

SMALL = {"block_size": 4, "num_anchors": 8, "num_layers": 2}
STRATEGIES = {
    "dflash": {"name": "dflash", **SMALL, "loss_type": "dpace", "sliding_window": 8},
    "domino": {"name": "domino", **SMALL, "emb_dim": 8, "gru_hidden_dim": 16},
}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("topology", ["offline", "colocated"])
def test_trains_and_then_exports_and_decodes_losslessly(
    specforge: Specforge, tiny_model: TinyModel, tmp_path: Path, *, name: str, topology: str
) -> None:
    bench = {"prompts": 2, "max_new_tokens": 12}
    run, run_file = tmp_path / "run", make_run_file(tiny_model, tmp_path / "run.yaml", topology=topology, bench=bench)
    run_file.write_text(yaml.safe_dump(yaml.safe_load(run_file.read_text()) | {"strategy": STRATEGIES[name]}))
    done = specforge("run", str(run_file))
    assert done.returncode == 0, done.stderr
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6
    evaluated = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert evaluated["simulated_acceptance_length"] >= 1.0
    if topology == "colocated":  # what follows does not know where features came from
        return
    exported = specforge("export", str(run), "--format", "sglang")
    assert exported.returncode == 0, exported.stderr
    benched = specforge("bench", str(run), "--draft", exported.stdout.strip(), "--json")
    assert benched.returncode == 0, benched.stderr
    result = json.loads(benched.stdout)
    assert result["lossless"] is True
    assert len(result["position_acceptance"]) == 3
