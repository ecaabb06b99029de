# SPDX-License-Identifier: Apache-2.0
"""One row of the table of bad inputs, and the workshop in which a row spoils something real."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tiny_model import TinyModel

RUN = "run"


@dataclass(frozen=True)
class BadInput:
    """A command that must be refused.

    :param spoil: makes the bad input in a workshop and returns the command's arguments.
    :param says: what the message must contain: the file, the key or sample, what is wrong and what to do.
    :param changes: patterns of files that the command may change; nothing else that was there before may.
    """

    name: str
    spoil: Callable[[Workshop], Sequence[str]]
    says: tuple[str, ...]
    changes: tuple[str, ...] = ()


@dataclass
class Workshop:
    """A directory of its own (the current one) with everything a row may spoil.

    :param trained: a finished run, to be copied.
    """

    root: Path
    model: TinyModel
    trained: Path
    held: list[Any] = field(default_factory=list)

    def write(self, name: str, content: str | bytes | Sequence[object]) -> str:
        """A file of text, bytes, or JSON lines; returns its name."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        return name

    def run_file(self, **sections: Any) -> str:
        """``run.yaml``: a small run that works, but for what ``sections`` change; a value None removes the key."""
        values = run_values(self.model)
        for name, section in sections.items():
            if isinstance(section, dict) and isinstance(values.get(name), dict):
                merged = {**values[name], **section}
                values[name] = {key: value for key, value in merged.items() if value is not None}
            elif section is None:
                del values[name]
            else:
                values[name] = section
        return self.write("run.yaml", yaml.safe_dump(values, sort_keys=False))

    def edited_run_file(self, old: str, new: str) -> str:
        """``run.yaml`` with one piece of its text replaced."""
        text = (self.root / self.run_file()).read_text()
        assert old in text
        return self.write("run.yaml", text.replace(old, new))

    def prompts(self, *rows: object) -> str:
        """A run file whose training prompts are these rows in ``prompts.jsonl``."""
        self.write("prompts.jsonl", rows)
        return self.run_file(data={"train": ["prompts.jsonl"], "eval": None})

    def raw_prompts(self, content: bytes) -> str:
        """A run file whose training prompts are a file of these bytes."""
        self.write("prompts.jsonl", content)
        return self.run_file(data={"train": ["prompts.jsonl"], "eval": None})

    def target(self, **config: Any) -> Path:
        """A copy of the model in ``target``, with keys of its config.json changed, or removed where None."""
        target = self.root / "target"
        shutil.copytree(self.model.path, target)
        values = json.loads((target / "config.json").read_text()) | config
        (target / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
        return target

    def run_on_target(self) -> str:
        """A run file for the copy in ``target``."""
        return self.run_file(target={"path": "target"})

    def finished(self) -> Path:
        """A finished run in ``run``, beside its run file ``run.yaml``."""
        self.run_file()
        shutil.copytree(self.trained, self.root / RUN)
        return self.root / RUN

    def one(self, pattern: str) -> Path:
        """The first file below the finished run that matches."""
        return min((self.root / RUN).glob(pattern))

    def without_prompts(self) -> str:
        """A run file with no held-out prompts."""
        return self.run_file(data={"eval": None})


def run_values(model: TinyModel) -> dict[str, Any]:
    """A small offline run of the tiny model: three windows, checkpoints after the second and the third."""
    return {
        "run": {"directory": RUN, "seed": 3},
        "topology": "offline",
        "target": {"name": "hf", "path": str(model.path)},
        "strategy": {"name": "eagle3", "ttt_steps": 2, "draft_vocab_size": 128},
        "data": {"train": [str(model.train)], "eval": [str(model.eval)], "max_length": 64},
        "capture": {"threads": 1},
        "training": {"global_batch_size": 8, "micro_batch_size": 4, "epochs": 1, "threads": 1},
        "loading": {"deadline_seconds": 30},
        "checkpoint": {"every_steps": 2},
        "bench": {"prompts": 2, "max_new_tokens": 4},
    }


def cut(path: Path, share: float = 0.5) -> None:
    """Truncate a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def overwrite(path: Path, offset: int, content: bytes) -> None:
    """Replace bytes inside a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def change_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON object on disk."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def contents(root: Path) -> dict[str, bytes]:
    """The bytes of every file below ``root``, by its path."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
