# SPDX-License-Identifier: Apache-2.0
"""Two real processes over gloo train what one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from specforge_core.checkpoint.resume import load_draft
from toy_run import ToyRun, largest_difference
from toy_strategy import MeasuringToyStrategy, ToyStrategy

_RANK = """
import sys
from pathlib import Path
import torch
from toy_run import ToyRun
from toy_strategy import MeasuringToyStrategy, ToyStrategy
from specforge_core.training.parallelism import DataParallel
torch.set_num_threads(1)
directory, rank, world, strategy, prompts = Path(sys.argv[1]), int(sys.argv[2]), 2, sys.argv[3], int(sys.argv[4])
ranks = DataParallel(
    rank, world_size=world, backend="gloo", init_method=f"file://{directory}/meet", device="cpu", timeout_seconds=60
)
assert ranks.sum_counts({"all": 0.1, f"only {rank}": 1e-300}) == {"all": 0.2, "only 0": 1e-300, "only 1": 1e-300}
run = ToyRun(directory=directory, parallelism=ranks, micro_batch_size=2, prompts=prompts,
             strategy={"plain": ToyStrategy, "measuring": MeasuringToyStrategy}[strategy]())
weights = run.weights()
torch.save(weights, directory / f"rank{rank}.pt")
ranks.close()
"""


@pytest.mark.parametrize(
    ("strategy", "prompts"), [("plain", 14), ("measuring", 14), ("plain", 13)], ids=["plain", "measuring", "odd"]
)
def test_two_ranks_train_what_one_does(tmp_path: Path, strategy: str, prompts: int) -> None:
    """13 prompts: each epoch's last window has one sample, so one rank has none."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(tmp_path), str(rank), strategy, str(prompts)],
            cwd=Path(__file__).parents[2] / "support",
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    chosen = {"plain": ToyStrategy, "measuring": MeasuringToyStrategy}[strategy]()
    alone = ToyRun(directory=tmp_path / "alone", strategy=chosen, prompts=prompts)
    weights = alone.weights()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert largest_difference(weights, first) < 1e-6

    one, two = ToyRun(directory=tmp_path).step().draft, ToyRun(directory=tmp_path).step().draft
    load_draft(tmp_path / "checkpoints", one)
    load_draft(tmp_path / "alone" / "checkpoints", two)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
