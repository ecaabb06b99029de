# SPDX-License-Identifier: Apache-2.0
"""The command line as a user has it: real processes, real files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from tiny_model import TinyModel

Specforge = Callable[..., "subprocess.CompletedProcess[str]"]


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """`specforge ARGUMENTS` as a process of its own, one thread, no network."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", "specforge_core.cli.main", *arguments],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def make_run_file(tiny_model: TinyModel, path: Path, **changes: Any) -> Path:
    """A small EAGLE-3 run of the tiny model: 24 samples, 8 per window."""
    values: dict[str, Any] = {
        "run": {"directory": str(path.parent / path.stem), "seed": 3},
        "target": {"name": "hf", "path": str(tiny_model.path)},
        "strategy": {"name": "eagle3", "ttt_steps": 3, "draft_vocab_size": 128},
        "data": {"train": [str(tiny_model.train)], "eval": [str(tiny_model.eval)], "max_length": 64},
        "training": {"global_batch_size": 8, "micro_batch_size": 4, "epochs": 2, "threads": 1},
        "capture": {"threads": 1},
        "checkpoint": {"every_steps": 2},
        "bench": {"prompts": 4, "max_new_tokens": 12},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    path.write_text(yaml.safe_dump(values))
    return path
