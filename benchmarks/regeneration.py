# SPDX-License-Identifier: Apache-2.0
"""What answers of the target's own buy: τ of a draft trained on a corpus, on last turns made anew, on every turn.

    python benchmarks/regeneration.py [--conversations 400] [--turns 3] [--tokens 150000] [--directory DIR]

On the demo's target: conversations of several of its prompts, with the corpus's own answers; the same with the last
answer, and with every answer, made by the target. A draft is trained on each with as many trained tokens, and benched
on the same held-out prompts. The target is made once and kept in the cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from specforge_core.contracts import SilentProgress
from specforge_core.run.demo import default_cache
from specforge_hf_target.demo_target import prepare_demo

WINDOW = 16
VARIANTS = {"corpus": None, "last turns": "last", "turn by turn": "all"}


def specforge(*arguments: str) -> None:
    """Run the command; what it says goes to standard error."""
    subprocess.run([sys.executable, "-m", "specforge_core.cli.main", *arguments], check=True, stdout=sys.stderr)


def write_conversations(source: Path, into: Path, *, turns: int, most: int | None) -> Path:
    """Exchanges joined to conversations of so many turns."""
    exchanges = [json.loads(line)["messages"] for line in source.read_text().splitlines()]
    joined = [exchanges[n : n + turns] for n in range(0, len(exchanges) - turns + 1, turns)][:most]
    rows = [{"messages": [message for exchange in some for message in exchange]} for some in joined]
    into.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return into


def trained_tokens(directory: Path) -> int:
    """Trained tokens of the prompts that were prepared for a run."""
    manifest = json.loads((directory / "features" / "train" / "prompts" / "manifest.json").read_text())
    return sum(source["trained_tokens"] for source in manifest["report"])


def train(name: str, values: dict[str, Any], root: Path, *, tokens: int) -> dict[str, Any]:
    """Train on one variant's data until so many tokens were trained; what its bench measured."""
    directory = root / name.replace(" ", "-")
    run_file = root / f"{directory.name}.yaml"
    run_file.write_text(yaml.safe_dump({**values, "run": {"directory": str(directory), "seed": 0}}))
    specforge("data", "check", str(run_file))
    prepared = trained_tokens(directory)
    prompts = json.loads((directory / "features" / "train" / "prompts" / "manifest.json").read_text())["prompts"]
    steps = max(1, round(tokens / (prepared / prompts * WINDOW)))
    epochs = -(-steps * WINDOW // prompts) + 1
    specforge("run", str(run_file), f"training.max_steps={steps}", f"training.epochs={epochs}")
    specforge("export", str(directory))
    specforge("bench", str(directory))
    return {**json.loads((directory / "bench.json").read_text()), "steps": steps, "prompts": prompts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=int, default=400)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=150_000, help="trained tokens of each draft")
    parser.add_argument("--directory", type=Path, default=Path("runs/regeneration"))
    options = parser.parse_args()
    root = options.directory.absolute()
    root.mkdir(parents=True, exist_ok=True)
    target = prepare_demo(default_cache(), SilentProgress())
    most = options.conversations
    corpus = write_conversations(target.train_prompts, root / "corpus.jsonl", turns=options.turns, most=most)
    held_out = write_conversations(target.eval_prompts, root / "held-out.jsonl", turns=1, most=None)
    values: dict[str, Any] = {
        "target": {"name": "hf", **target.section},
        "strategy": {"name": "eagle3", "ttt_steps": 4},
        "data": {"train": [str(corpus)], "eval": [str(held_out)], "max_length": 640},
        "training": {"global_batch_size": WINDOW, "learning_rate": 1.0e-3},
        "regenerate": {"max_tokens": target.answer_tokens, "batch_size": 64},
        "bench": {"prompts": 24, "max_new_tokens": 64, "threads": 1},
    }
    table = Table(title="τ on the demo's target, at equal trained tokens")
    for column in ("trained on", "conversations", "steps", "τ", "accepted at position 1, 2, …", "output identical"):
        table.add_column(column)
    for name, turns in VARIANTS.items():
        train_on = str(corpus)
        if turns is not None:
            made = root / f"answers-{turns}"
            run_file = root / f"answers-{turns}.yaml"
            section = {**values["regenerate"], "turns": turns, "output": str(made)}
            run_file.write_text(
                yaml.safe_dump({**values, "run": {"directory": str(root / turns)}, "regenerate": section})
            )
            specforge("regenerate", str(run_file))
            train_on = str(made / "train")
        result = train(name, {**values, "data": {**values["data"], "train": [train_on]}}, root, tokens=options.tokens)
        rates = " ".join(f"{rate:.2f}" for rate in result["position_acceptance"])
        identical = "yes" if result["lossless"] else "NO"
        tau = f"{result['acceptance_length']:.2f}"
        table.add_row(name, str(result["prompts"]), str(result["steps"]), tau, rates, identical)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
