# SPDX-License-Identifier: Apache-2.0
"""Preparing prompts: rows and tokens per second against the bare tokenizer, with 1 and 2 workers, and memory.

The bare tokenizer encodes the same rendered text, ``encode_batch`` in one thread: no reading, no template, no masks, no
writing. The sides alternate in one run, and the median of their rounds is given. Starting workers is left out of their
rate: it is measured by a set of a few rows. Memory is the peak of all processes together, measured in a process of its
own; pages of mapped files, which the system takes back when it likes, are not counted.

    python benchmarks/prompts.py [--rows 2000] [--rounds 3] [--model PATH] [--memory-rows 20000 [ROWS ...]]

The figures of the page are those of ``--rows 20000 --memory-rows 100000 1000000``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quiet import say_whether_quiet

WORDS = [
    *("the", "draft", "proposes", "several", "tokens", "and", "target", "checks", "them"),
    *("in", "one", "pass", "so", "output", "stays", "exactly", "what", "it"),
    *("would", "have", "been", "without", "a", "draft", "while", "fewer", "passes"),
    *("are", "needed", "because", "most", "proposals", "hold", "for", "code", "prose"),
    *("lists", "and", "numbers"),
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_LENGTH = 2048
_SAMPLE_SECONDS = 0.05


def make_rows(count: int, *, exchanges: int) -> Iterator[dict[str, Any]]:
    """Conversations of one to so many exchanges: of three, some 400 tokens each."""
    generator = random.Random(3)
    for _ in range(count):
        turns = []
        for _ in range(generator.randint(1, exchanges)):
            ask, answer = generator.randint(5, 60), generator.randint(40, 100 * exchanges)
            turns.append({"role": "user", "content": " ".join(generator.choices(WORDS, k=ask))})
            turns.append({"role": "assistant", "content": " ".join(generator.choices(WORDS, k=answer)) + "."})
        yield {"messages": turns}


def write_rows(path: Path, count: int, *, exchanges: int = 3) -> Path:
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in make_rows(count, exchanges=exchanges))
    return path


def write_token_rows(path: Path, count: int) -> Path:
    """Rows of some 100 token ids: nothing is encoded, so a million of them take a minute."""
    generator = random.Random(3)
    with path.open("w", encoding="utf-8") as out:
        for _ in range(count):
            ids = generator.choices(range(8000), k=generator.randint(60, 140))
            out.write(json.dumps({"input_ids": ids, "loss_mask": [0] * 20 + [1] * (len(ids) - 20)}) + "\n")
    return path


def make_tokenizer(directory: Path) -> Path:
    """A byte-level BPE of 8,000 tokens, trained on words like these: no model is at hand everywhere."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (turn["content"] for row in make_rows(500, exchanges=3) for turn in row["messages"])
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    Qwen3Config(vocab_size=8192, architectures=["Qwen3ForCausalLM"]).save_pretrained(directory)
    return directory


def prepare(model: Path, source: Path, directory: Path, *, workers: int) -> Any:
    from specforge_core.config.run_config import DataSection
    from specforge_core.contracts import SilentProgress
    from specforge_core.prompts.prepare import prepare_prompts
    from specforge_core.run.tokenizer import PluginTokenizer
    from specforge_hf_target.config import HfTargetConfig

    return prepare_prompts(
        [source],
        directory=directory,
        tokenizer=PluginTokenizer(
            "specforge_hf_target.tokenizer:load_tokenizer", HfTargetConfig(name="hf", path=str(model))
        ),
        settings=DataSection(train=[source], max_length=MAX_LENGTH, workers=workers),
        vocab_size=1 << 20,
        progress=SilentProgress(),
    )


def seconds_of(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure_speed(model: Path, directory: Path, *, rows: int, rounds: int) -> None:
    """Print rows and tokens per second of each side."""
    from transformers import AutoTokenizer

    source, few = write_rows(directory / "rows.jsonl", rows), write_rows(directory / "few.jsonl", 64)
    fast = AutoTokenizer.from_pretrained(model)
    texts = [fast.apply_chat_template(row["messages"], tokenize=False) for row in make_rows(rows, exchanges=3)]
    tokens = sum(len(encoding.ids) for encoding in fast.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
    places = iter(range(1 << 20))

    def preparing(of: Path, workers: int) -> Callable[[], Any]:
        return lambda: prepare(model, of, directory / f"set-{next(places)}", workers=workers)

    def bare() -> None:
        for first in range(0, len(texts), 1000):
            fast.backend_tokenizer.encode_batch(texts[first : first + 1000], add_special_tokens=False)

    taken: dict[str, list[float]] = {"bare tokenizer": [], "1 worker": [], "2 workers": []}
    for _ in range(rounds):
        taken["bare tokenizer"].append(seconds_of(bare))
        for workers, side in ((1, "1 worker"), (2, "2 workers")):
            start = seconds_of(preparing(few, workers))
            taken[side].append(seconds_of(preparing(source, workers)) - start)
    reference = statistics.median(taken["bare tokenizer"])
    print(f"{rows:,} rows, {tokens:,} tokens, median of {rounds} rounds; load average {os.getloadavg()[0]:.1f}")
    for side, seconds in taken.items():
        median = statistics.median(seconds)
        print(f"{side:>15}: {rows / median:>8,.0f} rows/s {tokens / median:>11,.0f} tokens/s  {reference / median:.2f}")


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += tree(int(child))
    return found


def memory_of(pid: int) -> int:
    """Bytes that a process holds and no file has."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def measure_memory(model: Path, directory: Path, *, rows: int, workers: int, tokens: bool) -> None:
    """Print the peak of a process that prepares so many short rows, and of its workers.

    :param tokens: rows are tokens already.
    """
    place = directory / f"rows-{rows}.jsonl"
    source = write_token_rows(place, rows) if tokens else write_rows(place, rows, exchanges=1)
    command = [sys.executable, __file__, "--prepare", str(model), str(source), str(directory / f"m-{rows}-{workers}")]
    peak, began = 0, time.perf_counter()
    with subprocess.Popen([*command, str(workers)]) as process:
        while process.poll() is None:
            try:
                peak = max(peak, sum(memory_of(pid) for pid in tree(process.pid)))
            except OSError:  # one of them ended just now
                continue
            time.sleep(_SAMPLE_SECONDS)
    source.unlink()
    seconds = time.perf_counter() - began
    print(f"{rows:>9,} rows, {workers} workers: {peak / 2**20:,.0f} MiB at most, {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a tokenizer with a chat template; default: one made here")
    parser.add_argument("--memory-rows", type=int, nargs="*", default=[2000, 20_000])
    parser.add_argument("--memory-tokens", action="store_true", help="measure memory with rows that are tokens already")
    parser.add_argument("--directory", type=Path, help="where the sets are written; default: a temporary directory")
    parser.add_argument("--prepare", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        model, source, place, workers = options.prepare
        prepare(Path(model), Path(source), Path(place), workers=int(workers))
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        directory = Path(temporary)
        model = options.model or make_tokenizer(directory / "model")
        if options.rounds:
            say_whether_quiet()
            measure_speed(model, directory, rows=options.rows, rounds=options.rounds)
        for rows in options.memory_rows:
            for workers in (1, 2):
                measure_memory(model, directory, rows=rows, workers=workers, tokens=options.memory_tokens)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for the bare tokenizer
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
