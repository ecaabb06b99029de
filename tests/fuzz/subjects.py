# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: files that others may have written, how they are read, and what must come of it."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import torch
import yaml
import zstandard
from mutations import change_json, damage
from pyarrow import feather, parquet
from specforge_core.checkpoint.manifest import write_manifest
from specforge_core.checkpoint.resume import CheckpointReader, load_draft
from specforge_core.checkpoint.writer import CheckpointWriter
from specforge_core.config.load import load_run_config
from specforge_core.contracts import (
    AccessDenied,
    CaptureBatch,
    DataError,
    PartContext,
    Prompt,
    SampleRef,
    Strategy,
    check_signature,
    sign,
)
from specforge_core.export.writer import ExportPlan, check_export, export_draft
from specforge_core.features.contents import VouchedStore
from specforge_core.features.file_channel import FileChannel
from specforge_core.features.file_store import FileStore
from specforge_core.features.ledger import Ledger
from specforge_core.features.record_file import frame
from specforge_core.hooks.builtin import FileChannelConfig, FileStoreConfig
from specforge_core.hooks.descriptors import resolve
from specforge_core.hooks.manager import PluginRegistry
from specforge_core.prompts.prompt_set import PromptSet, write_prompt_set
from specforge_core.prompts.reading.rows import BadRow, read_rows
from specforge_core.reporting.html import render_page
from specforge_core.reporting.records import read_run
from specforge_core.testing.samples import make_ref, make_sample
from specforge_core.testing.synthetic import SyntheticTarget
from specforge_hf_target.config import HfTargetConfig
from specforge_redis_channel.entries import EntryDecoder, EntryEncoder
from torch import nn
from xxhash import xxh3_64

TOKEN, RUN = "sixteen characters or more", "r"
CONTEXT = PartContext(run_id=RUN, directory=Path(), token=TOKEN)
REFS = [
    sign(replace(make_ref(number, epoch=number % 2), digest=f"{number:064x}"), token=TOKEN, run_id=RUN)
    for number in range(12)
]
TARGET = SyntheticTarget()
STRATEGIES = ("eagle3", "dflash", "domino")
BATCHES = [CaptureBatch(split="train", epoch=0, first=4 * n, count=4, fingerprint="a-b-c") for n in range(5)]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One kind of files.

    :param make: writes honest ones into an empty directory; what it returns is given to ``read``.
    :param read: reads them as the product does; a value that can be compared.
    :param change: a file's content, changed.
    :param judge: what is wrong with a value that was read from changed files, given the honest one; "" for nothing.
    :param files: which files are changed.
    :param then: what the author does after he changed a file.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path, Any], Any]
    judge: Callable[[Any, Any], str]
    change: Callable[[bytes, Random], bytes] = damage
    files: str = "**/*"
    then: Callable[[Path], None] = lambda directory: None


def same(honest: Any, found: Any) -> str:
    return "" if found == honest else f"other values: {found!r:.200}"


def anything(honest: Any, found: Any) -> str:
    """Data that its author may write as he likes: it must only not break anything."""
    return ""


def part_of(honest: Any, found: Any) -> str:
    strange = [item for item in found if item not in honest]
    return f"what nobody wrote: {strange[0]!r:.200}" if strange else ""


# Run files


def make_run_file(directory: Path) -> None:
    values = {
        "run": {"directory": "runs/x", "seed": 3, "id": "x"},
        "topology": "disaggregated",
        "target": {"name": "hf", "path": "model"},
        "strategy": {"name": "eagle3", "ttt_steps": 3},
        "data": {"train": ["a.jsonl"], "max_length": 64},
        "store": {"name": "file", "path": "features"},
        "channel": {"name": "redis", "url": "redis://:password@127.0.0.1:6379/0"},
        "training": {"global_batch_size": 8, "epochs": 2, "learning_rate": 1e-4},
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(values) + "bench: &a {prompts: 4}\n")


def read_run_file(directory: Path, given: Any) -> Any:
    return load_run_config(directory / "run.yaml", ["training.epochs=3"]).config.model_dump(mode="json")


# Prompts


def make_rows(directory: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked, answered = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
    rows: list[dict[str, Any]] = [
        {"id": "a", "messages": [asked, answered], "tools": [call], "system": "s"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho", "weight": 0}]},
        {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]},
        {"messages": [asked], "choices": [{"message": {**answered, "tool_calls": [call]}, "finish_reason": "stop"}]},
        {"messages": [asked, {**answered, "channel": "analysis"}, {**answered, "channel": "final"}]},
        {"text": "hiho", "spans": [[2, 4]]},
        {"prompt": [asked], "completion": "ho"},
        {"instruction": "hi", "input": "x", "output": "ho", "history": [["a", "b"]]},
        {"prompt_token_ids": [1], "choices": [{"token_ids": [2]}]},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (directory / "rows.jsonl").write_bytes(lines)
    (directory / "rows.json").write_text(json.dumps(rows))
    (directory / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    (directory / "rows.jsonl.zst").write_bytes(zstandard.compress(lines))
    talks = pa.Table.from_pylist([{"id": row.get("id"), "messages": row["messages"]} for row in rows[:1]] * 9)
    parquet.write_table(talks, directory / "rows.parquet")
    feather.write_feather(talks, directory / "rows.feather")


def read_prompt_rows(directory: Path, given: Any) -> Any:
    """Of every file; one that cannot be read does not keep the others from it."""
    found, errors = [], []
    for path in sorted(directory.iterdir()):
        try:
            found += [replace(row, where="") for row in read_rows([path]) if not isinstance(row, BadRow)]
        except DataError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return found


def make_prompts(directory: Path) -> None:
    prompts = [Prompt(f"p{n}", list(range(5 + n)), [0, 1, 1, 0, 1] + [1] * n) for n in range(9)]
    write_prompt_set(directory / "prompts", prompts, fingerprint="f")


def read_prompts(directory: Path, given: Any) -> Any:
    opened = PromptSet.open(directory / "prompts")
    counts = opened.token_counts(20).tolist()
    return counts, opened.fingerprint, opened.dropped, [(p.prompt_id, p.input_ids, p.loss_mask) for p in opened]


# Refs, leases, samples


def make_channel(directory: Path) -> None:
    channel = open_channel(directory)
    writer = channel.writer("honest")
    for first in range(0, len(REFS), 4):
        writer.publish(REFS[first : first + 4])
    desk = channel.leases()
    desk.offer(BATCHES)
    desk.take("honest", 0.0)
    reader = channel.reader()
    reader.poll(3, 0.0)
    reader.ack([ref.sample_id for ref in REFS[:2]], 1)
    for part in (reader, desk, writer):
        part.close()


def open_channel(directory: Path) -> FileChannel:
    return FileChannel(FileChannelConfig(name="file", path=directory, writer_timeout_seconds=0.2), CONTEXT)


def read_refs(directory: Path, given: Any) -> list[SampleRef]:
    """Those that are trusted, of what nobody acked."""
    reader = open_channel(directory).reader()
    try:
        return [ref for ref in reader.poll(1000, 0.0) if is_trusted(ref)]
    finally:
        reader.close()


def is_trusted(ref: SampleRef) -> bool:
    try:
        check_signature(ref, token=TOKEN, run_id=RUN)
    except AccessDenied:
        return False
    return True


def all_refs(honest: Any, found: Any) -> str:
    """Acks may have got lost: then a ref comes again, which the ledger notices. Nothing else may come."""
    return part_of(REFS, found)


def read_leases(directory: Path, given: Any) -> Any:
    desk = open_channel(directory).leases()
    try:
        return [*desk.outstanding(), desk.ended]
    finally:
        desk.close()


def change_a_record(content: bytes, chance: Random) -> bytes:
    """As somebody does who knows the format: the checksum is right again."""
    lines = content.split(b"\n")
    number = chance.randrange(len(lines))
    try:
        body = change_json(json.loads(lines[number][11:]), chance)
        lines[number] = frame(chr(lines[number][0]), body).rstrip(b"\n")
    except (ValueError, IndexError, UnicodeEncodeError):
        return damage(content, chance)
    return b"\n".join(lines)


def make_store(directory: Path) -> list[SampleRef]:
    store = VouchedStore(open_store(directory))
    refs = [store.put(f"p{number}.e0", make_sample(number)) for number in range(2)]
    store.close()
    return refs


def open_store(directory: Path) -> FileStore:
    return FileStore(FileStoreConfig(name="file", path=directory), CONTEXT)


def read_samples(directory: Path, refs: list[SampleRef]) -> Any:
    """What is read, and that the store still takes new samples."""
    store = VouchedStore(open_store(directory))
    new = store.put("p9.e0", make_sample(9))
    store.delete(new)
    return [bits(store.get(ref).features) for ref in refs]


def bits(tensors: Any) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        name: (str(t.dtype), list(t.shape), t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


def change_a_sample(content: bytes, chance: Random) -> bytes:
    """As somebody does who knows the format: other bytes or another header, the checksum right again."""
    try:
        length = struct.unpack("<Q", content[:8])[0]
        header, body = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
        if chance.random() < 0.5:
            body[chance.randrange(len(body))] ^= 1
        else:
            header = change_json(header, chance)
        header["__metadata__"]["checksum"] = xxh3_64(bytes(body)).hexdigest()
        text = json.dumps(header).encode()
    except (ValueError, KeyError, TypeError, IndexError, struct.error):
        return damage(content, chance)
    return struct.pack("<Q", len(text)) + text + bytes(body)


# The ledger


def make_ledger(directory: Path) -> None:
    ledger = Ledger(directory / "ledger.sqlite", run_id=RUN)
    ledger.see(REFS)
    for window in range(3):
        ledger.deal(window, [ref.sample_id for ref in REFS[3 * window : 3 * window + 3]])
    ledger.trained(0)
    ledger.freed([REFS[0].sample_id])
    ledger.close()


def read_ledger(directory: Path, given: Any) -> Any:
    ledger = Ledger(directory / "ledger.sqlite", run_id=RUN)
    try:
        found = ledger.find([ref.sample_id for ref in REFS])
        return found, ledger.available(), ledger.covered(2), list(ledger.deals())
    finally:
        ledger.close()


# Checkpoints


def new_draft() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


def training_state(draft: nn.Module) -> dict[str, torch.Tensor]:
    draft_state = {f"draft.{name}": tensor for name, tensor in draft.state_dict().items()}
    return {**draft_state, "optimizer.step": torch.tensor(7), "optimizer.moment": torch.ones(3, 4)}


def make_checkpoints(directory: Path) -> None:
    writer = CheckpointWriter(directory, keep=2, provenance={"config": {"training": {"epochs": 2}}})
    for step in (1, 2):
        writer.write(step, tensors=training_state(new_draft()), progress={"epoch": 0}, score=float(step))


def read_checkpoints(directory: Path, given: Any) -> Any:
    draft, state = new_draft(), training_state(new_draft())
    best = load_draft(directory, draft, which="best")
    progress = CheckpointReader(directory, {"config": {"training": {"epochs": 2}}}).resume(state)
    return best, bits(draft.state_dict()), progress, bits(state)


def remake_manifests(directory: Path) -> None:
    """As somebody does who makes a whole checkpoint: its manifest vouches for what he put there."""
    for step in directory.glob("step-*"):
        (step / "manifest.json").unlink(missing_ok=True)
        write_manifest(step)


# What is shown


def make_records(directory: Path) -> None:
    steps = [{"step": n, "loss": 2.0 / n, "accuracy_0": 0.5, "seconds": 0.1, "waited_seconds": 0.0} for n in (1, 2, 3)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    (directory / "evaluations.jsonl").write_text(json.dumps({"step": 3, "simulated_acceptance_length": 1.5}) + "\n")
    (directory / "config.yaml").write_text("strategy: {name: s}\ntarget: {name: t}\ntopology: offline\n")
    (directory / "provenance.json").write_text('{"plugins": {"strategy:s": {"version": "1"}}}')
    speed = {"decode": 1.0, "with_prefill": 1.0}
    bench = {
        **{"acceptance_length": 2.0, "acceptance_rate": 0.5, "position_acceptance": [0.5, None], "lossless": True},
        **{"speedup": speed, "tokens_per_second": {"plain": speed, "speculative": speed}, "facts": {"target": "x"}},
        **{"prompts": 2, "new_tokens": 5, "draft_tokens": 4},
    }
    (directory / "bench.json").write_text(json.dumps(bench))


def read_page(directory: Path, given: Any) -> str:
    return render_page(read_run(directory), {})


def no_markup(honest: str, found: str) -> str:
    """Tags of our own only."""
    return "" if found.count("<script") + found.count("<img") == 0 else "markup of theirs is in the page"


# Targets and exports


def make_target(directory: Path) -> None:
    config = {
        **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "float32", "vocab_size": 264},
        **{"num_hidden_layers": 8, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 8, "intermediate_size": 64, "rms_norm_eps": 1e-6, "max_position_embeddings": 512},
        **{"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "eos_token_id": [1, 2]},
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')


def read_target(directory: Path, given: Any) -> Any:
    return HfTargetConfig(name="hf", path=str(directory)).describe()


def make_export(name: str) -> Callable[[Path], Strategy]:
    def make(directory: Path) -> Strategy:
        spec = PluginRegistry.discover().strategy(name)
        made: Strategy = resolve(spec.factory)(spec.config.model_validate({"name": name, **spec.example}))
        torch.manual_seed(0)
        plan = ExportPlan(directory=directory / "export", format="sglang", provenance={"step": 1})
        export_draft(made, made.build_draft(TARGET), TARGET, plan=plan)
        return made

    return make


def read_export(directory: Path, strategy: Strategy) -> Any:
    check_export(directory / "export")
    draft = strategy.load_export(directory / "export", TARGET)
    return bits(draft.state_dict())


def forge_export(directory: Path) -> None:
    """As another trainer's export, which nothing vouches for."""
    (directory / "export" / "specforge.json").unlink(missing_ok=True)


# Redis entries


def make_entries(directory: Path) -> None:
    fields = EntryEncoder().encode(REFS)
    (directory / "entry").write_bytes(b"\n".join(fields))


def read_entries(directory: Path, given: Any) -> list[SampleRef]:
    layouts, _, batch = (directory / "entry").read_bytes().partition(b"\n")
    _, refs = EntryDecoder("redis://127.0.0.1").decode((b"1-1", (b"w", b"honest", b"l", layouts, b"r", batch)))
    return [ref for ref in refs if is_trusted(ref)]


SUBJECTS: dict[str, Subject] = {
    "run file": Subject(make=make_run_file, read=read_run_file, judge=anything),
    "prompt rows": Subject(make=make_rows, read=read_prompt_rows, judge=anything),
    "prompt set": Subject(make=make_prompts, read=read_prompts, judge=same),
    "refs": Subject(make=make_channel, read=read_refs, judge=all_refs, files="*.*s"),
    "refs, checksums right": Subject(
        make=make_channel, read=read_refs, judge=all_refs, change=change_a_record, files="*.*s"
    ),
    "leases": Subject(make=make_channel, read=read_leases, judge=part_of, files="leases.log"),
    "leases, checksums right": Subject(
        make=make_channel, read=read_leases, judge=anything, change=change_a_record, files="leases.log"
    ),
    "samples": Subject(make=make_store, read=read_samples, judge=same),
    "samples, checksums right": Subject(
        make=make_store, read=read_samples, judge=same, change=change_a_sample, files="*/*.safetensors"
    ),
    "ledger": Subject(make=make_ledger, read=read_ledger, judge=same),
    "checkpoints": Subject(make=make_checkpoints, read=read_checkpoints, judge=same),
    "checkpoints, manifest right": Subject(
        make=make_checkpoints, read=read_checkpoints, judge=anything, files="step-*/**/*", then=remake_manifests
    ),
    "targets": Subject(make=make_target, read=read_target, judge=anything),
    **{f"exports of {name}": Subject(make=make_export(name), read=read_export, judge=same) for name in STRATEGIES},
    **{
        f"exports of {name}, not vouched for": Subject(
            make=make_export(name), read=read_export, judge=anything, files="export/*.*", then=forge_export
        )
        for name in STRATEGIES
    },
    "redis entries": Subject(make=make_entries, read=read_entries, judge=all_refs),
    "report": Subject(make=make_records, read=read_page, judge=no_markup),
}
