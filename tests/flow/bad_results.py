# SPDX-License-Identifier: Apache-2.0
"""What a run left behind, spoilt: features, refs, checkpoints, exports, records; and a run that is in use."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from bad_input import RUN, BadInput, Workshop, change_json, cut, overwrite
from safetensors.torch import load_file, save_file

EXPORT = f"{RUN}/export/sglang"
SAMPLE = "features/train/store/??/*.safetensors"
REFS = "features/train/refs/*.refs"


def _finished(damage: Callable[[Workshop], object], *command: str, trained: bool = True):
    """A command on a finished run that was damaged; ``trained=False``: one that was only captured."""

    def spoil(w: Workshop) -> Sequence[str]:
        root = w.finished()
        if not trained:
            for path in root.iterdir():
                if path.name != "features":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        damage(w)
        return command

    return spoil


def _untrained(damage: Callable[[Workshop], object], *command: str):
    return _finished(damage, *(command or ("train", "run.yaml")), trained=False)


_SPEED = {"decode": 1.0, "with_prefill": 1.0}
_BENCH = {
    **{"lossless": True, "acceptance_length": 2.0, "acceptance_rate": 0.5, "position_acceptance": [0.5], "facts": {}},
    **{"speedup": _SPEED, "tokens_per_second": {"plain": _SPEED, "speculative": _SPEED}},
    **{"prompts": 1, "new_tokens": 2, "draft_tokens": 1},
}


def _nothing(w: Workshop) -> None:
    pass


def _drop_last_line(w: Workshop) -> None:
    """As capture leaves the refs when it is killed."""
    path = w.one(REFS)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-3]))


def _drop_refs_but_close(w: Workshop) -> None:
    path = w.one(REFS)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:-3], lines[-1]]))


def _alter_features(w: Workshop) -> None:
    """One byte of a sample's tensors, which begin after the header."""
    path = w.one(SAMPLE)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    overwrite(path, header + 100, b"\x7f")


def _other_prompts(w: Workshop) -> None:
    source = w.model.train.read_text().splitlines(keepends=True)
    w.write("fewer.jsonl", "".join(source[:20]))


def _other_target(w: Workshop) -> None:
    w.target()
    w.run_on_target()


def _export(**config: object):
    return lambda w: change_json(w.root / EXPORT / "config.json", **config)


def _export_without(name: str):
    def damage(w: Workshop) -> None:
        path = w.root / EXPORT / "model.safetensors"
        save_file({key: value for key, value in load_file(path).items() if key != name}, path)

    return damage


def _export_reshaped(w: Workshop) -> None:
    path = w.root / EXPORT / "model.safetensors"
    save_file({**load_file(path), "fc.weight": torch.zeros(2, 2)}, path)


def _link(name: str):
    """What was there lies beside the run, behind a link."""

    def damage(w: Workshop) -> None:
        path = w.root / RUN / name
        path.rename(w.root / path.name)
        path.symlink_to(w.root / path.name)

    return damage


_NO_ROTATION = {"rope_type": "linear", "factor": 0}
_TWO_LAYERS = {"eagle_aux_hidden_state_layer_ids": [0, 1]}


def _foreign(damage: Callable[[Workshop], object]) -> Callable[[Workshop], None]:
    """As an export of another trainer's, which has no record of what its files were."""

    def spoil(w: Workshop) -> None:
        damage(w)
        (w.root / EXPORT / "specforge.json").unlink()

    return spoil


def _export_of_integers(w: Workshop) -> None:
    path = w.root / EXPORT / "model.safetensors"
    stored = load_file(path)
    save_file({**stored, "fc.weight": stored["fc.weight"].long()}, path)


def _step_file(name: str) -> Callable[[Workshop], Path]:
    return lambda w: w.one(f"checkpoints/step-00000003/{name}")


def _lock(role: str):
    def damage(w: Workshop) -> None:
        handle = open(w.root / RUN / f".{role}.lock", "w")  # noqa: SIM115 - closed by the test
        handle.write("pid 4242")
        handle.flush()
        fcntl.flock(handle, fcntl.LOCK_EX)
        w.held.append(handle)

    return damage


def _trained_from_the_first_token(w: Workshop) -> None:
    w.write("eval.jsonl", [{"input_ids": [1, 2, 3], "loss_mask": [1, 1, 1]}])


def _link(name: str):
    def damage(w: Workshop) -> None:
        (w.root / RUN / name).rename(w.root / "elsewhere")
        (w.root / RUN / name).symlink_to(w.root / "elsewhere")

    return damage


def _report_elsewhere(w: Workshop) -> None:
    (w.root / "elsewhere").mkdir()
    (w.root / RUN / "report").symlink_to(w.root / "elsewhere")


def _file_for_directory(name: str):
    def damage(w: Workshop) -> None:
        shutil.rmtree(w.root / RUN / name, ignore_errors=True)
        w.write(f"{RUN}/{name}", "x")

    return damage


def _directory_for_file(name: str):
    def damage(w: Workshop) -> None:
        (w.root / RUN / name).unlink(missing_ok=True)
        (w.root / RUN / name).mkdir()

    return damage


TABLE = [
    # features
    BadInput(
        "training before capture",
        lambda w: ["train", w.run_file()],
        ("run/features/train", "no captured features", "run `specforge capture`"),
    ),
    BadInput(
        "features of another target",
        _untrained(_other_target),
        ("run/features/train", "something else", "target: captured with", "choose another data.features"),
    ),
    BadInput(
        "features of other prompts",
        _untrained(_other_prompts, "train", "run.yaml", "data.train=[fewer.jsonl]"),
        ("run/features/train", "something else", "prompts: captured with", "choose another data.features"),
        changes=("run/features/train/prompts/*",),
    ),
    BadInput(
        "capture of other layers into the same place",
        _untrained(_nothing, "capture", "run.yaml", "strategy.aux_layer_ids=[0, 1, 2]"),
        ("run/features/eval", "request: captured with", "aux_layer_ids", "choose another data.features"),
    ),
    BadInput(
        "features elsewhere that are none",
        _untrained(lambda w: (w.root / "empty").mkdir(), "train", "run.yaml", "data.features=empty"),
        ("empty/train", "no captured features", "data.features"),
    ),
    BadInput(
        "features cut short",
        _untrained(lambda w: cut(w.one(SAMPLE), 0.7)),
        (
            "features/train/store",
            ".safetensors",
            "bytes where the header says",
            "remove the feature directory and run",
        ),
    ),
    BadInput(
        "features without a header",
        _untrained(lambda w: overwrite(w.one(SAMPLE), 0, b"\xff" * 16)),
        (
            "features/train/store",
            ".safetensors",
            "header",
            "remove the feature directory and run",
        ),
    ),
    BadInput(
        "features deleted",
        _untrained(lambda w: w.one(SAMPLE).unlink()),
        ("features/train/store", "was deleted, or never put", "specforge capture"),
    ),
    BadInput(
        "held-out features deleted",
        _finished(lambda w: w.one("features/eval/store/??/*.safetensors").unlink(), "eval", RUN),
        ("features/eval/store", "was deleted, or never put", "specforge capture"),
    ),
    BadInput(
        "refs altered",
        _untrained(lambda w: overwrite(w.one(REFS), 400, b"XXXX")),
        ("features/train/refs", ".refs", "malformed record", "capture into a new directory"),
    ),
    BadInput(
        "refs deleted",
        _untrained(lambda w: w.one(REFS).unlink(), "train", "run.yaml", "loading.deadline_seconds=1"),
        ("sample train-", "not captured within 1 s", "0 refs in all", "see what the capture half is doing"),
    ),
    BadInput(
        "capture that never ended",
        _untrained(_drop_last_line, "train", "run.yaml", "channel={name: file, writer_timeout_seconds: 1}"),
        ("features/train/refs", "died before it had published everything", "run it again"),
    ),
    BadInput(
        "sample that never came",
        _untrained(_drop_refs_but_close),
        ("sample ", "will never come", "capture features from the same prompts"),
    ),
    BadInput(
        "feature manifest is no JSON",
        _untrained(lambda w: cut(w.root / RUN / "features/train/features.json")),
        ("features/train/features.json", "not readable as JSON", "capture again"),
    ),
    BadInput(
        "feature manifest nested deep",
        _untrained(lambda w: w.write(f"{RUN}/features/train/features.json", '{"target":' + "[" * 100_000)),
        ("features/train/features.json", "nested too deeply", "capture again"),
    ),
    BadInput(
        "feature manifest of wrong kinds",
        _untrained(lambda w: change_json(w.root / RUN / "features/train/features.json", target=[1], request="x")),
        ("features/train", "target: captured with [1]", "request: captured with 'x'", "choose another data.features"),
    ),
    BadInput(
        "feature manifest is a list",
        _untrained(lambda w: w.write(f"{RUN}/features/train/features.json", "[]")),
        ("features/train/features.json", "not a JSON object", "capture again"),
    ),
    BadInput(
        "features altered",
        _untrained(_alter_features),
        ("features/train/store", ".safetensors", "not the ones that were written", "remove the feature directory"),
    ),
    BadInput(
        "learning rate at which training diverges",
        _untrained(_nothing, "train", "run.yaml", "training.learning_rate=1e30"),
        ("samples train-", "not finite in optimizer step 2", "lower training.learning_rate"),
    ),
    # checkpoints
    BadInput(
        "checkpoint of another learning rate",
        _finished(_nothing, "train", "run.yaml", "training.learning_rate=0.5"),
        ("step-00000003", "of another run", "config.training.learning_rate", "0.5", "another run.directory"),
    ),
    BadInput(
        "checkpoint of another strategy setting",
        _finished(_nothing, "run", "run.yaml", "strategy.ttt_steps=3"),
        ("step-00000003", "of another run", "config.strategy.ttt_steps", "another run.directory"),
    ),
    BadInput(
        "checkpoint of another draft",
        _finished(_nothing, "export", "run.yaml", "--overwrite", "strategy.draft_vocab_size=64"),
        ("step-00000003", "of another draft", "[128", "[64", "use the strategy settings"),
    ),
    BadInput(
        "checkpoint cut short",
        _finished(lambda w: cut(_step_file("tensors/*.safetensors")(w)), "train", "run.yaml"),
        ("step-00000003/tensors/", "damaged", "remove its step directory"),
    ),
    BadInput(
        "checkpoint file missing",
        _finished(lambda w: _step_file("tensors/*.safetensors")(w).unlink(), "bench", RUN),
        ("step-00000003/tensors/", "damaged: the file is missing", "remove its step directory"),
    ),
    BadInput(
        "checkpoint altered",
        _finished(lambda w: overwrite(_step_file("tensors/*.safetensors")(w), 3000, b"ABCDEFGH"), "eval", RUN),
        ("step-00000003/tensors/", "damaged: its bytes are not", "remove its step directory"),
    ),
    BadInput(
        "checkpoint manifest is no JSON",
        _finished(lambda w: cut(_step_file("manifest.json")(w)), "export", RUN, "--overwrite"),
        ("step-00000003/manifest.json", "damaged", "remove its step directory"),
    ),
    BadInput(
        "nothing trained to evaluate",
        _untrained(_nothing, "eval", "run.yaml"),
        ("run/checkpoints", "no complete", "train first"),
    ),
    BadInput(
        "nothing trained to export",
        _untrained(_nothing, "export", "run.yaml"),
        ("run/checkpoints", "no complete", "train first"),
    ),
    BadInput(
        "nothing trained to bench",
        _untrained(_nothing, "bench", "run.yaml"),
        ("run/checkpoints", "no complete", "train first"),
    ),
    BadInput(
        "checkpoint named that is none",
        _finished(_nothing, "eval", RUN, "--checkpoint", "run/checkpoints/step-00000099"),
        ("step-00000099", "no complete checkpoint", "name another directory"),
    ),
    BadInput(
        "best checkpoint unreadable",
        _finished(lambda w: w.write(f"{RUN}/checkpoints/best", b"\xff\xfe"), "eval", RUN, "--checkpoint", "best"),
        ("run/checkpoints/best", "damaged", "--checkpoint latest"),
    ),
    # exports
    BadInput(
        "export format unknown",
        _finished(_nothing, "export", RUN, "--format", "gguf"),
        ("--format", "'eagle3' does not write 'gguf'", "choose one of: sglang, speculators"),
    ),
    BadInput(
        "export into what is there",
        _finished(_nothing, "export", RUN),
        ("run/export/sglang", "not empty", "--overwrite"),
    ),
    BadInput(
        "export is a file",
        _finished(_file_for_directory("export/sglang"), "export", RUN, "--overwrite"),
        ("run/export/sglang", "file of that name"),
    ),
    BadInput(
        "bench of no export",
        _finished(_nothing, "bench", RUN, "--draft", "gone"),
        ("gone/config.json", "no such file", "an export holds"),
    ),
    BadInput(
        "bench of another model",
        _finished(_foreign(_export(architectures=["LlamaForCausalLM"])), "bench", RUN, "--draft", EXPORT),
        ("export/sglang/config.json", "not the config of an EAGLE3 draft", "name an EAGLE3 export"),
    ),
    BadInput(
        "export lacks a field",
        _finished(
            _foreign(lambda w: w.write(f"{EXPORT}/config.json", '{"architectures": ["LlamaForCausalLMEagle3"]}')),
            "bench",
            RUN,
            "--draft",
            EXPORT,
        ),
        ("export/sglang/config.json", "is missing", "export"),
    ),
    BadInput(
        "export has text for a size",
        _finished(_foreign(_export(hidden_size="wide")), "bench", RUN, "--draft", EXPORT),
        ("export/sglang/config.json", "hidden_size", "export"),
    ),
    BadInput(
        "export claims a size that no machine has",
        _finished(_foreign(_export(intermediate_size=10**7)), "bench", RUN, "--draft", EXPORT),
        ("export/sglang/model.safetensors", "expected [10000000, 32]", "export the draft again"),
    ),
    BadInput(
        "export has a list for RoPE",
        _finished(_foreign(_export(rope_parameters=[1])), "bench", RUN, "--draft", EXPORT),
        ("export/sglang/config.json: rope_parameters", "[1] is not an object", "export"),
    ),
    BadInput(
        "export's RoPE divides by zero",
        _finished(
            _foreign(_export(rope_parameters={"rope_type": "linear", "factor": 0})), "bench", RUN, "--draft", EXPORT
        ),
        ("export/sglang/config.json: rope_parameters", "'factor' is not between", "export"),
    ),
    BadInput(
        "export has a list for its own section",
        _finished(_foreign(_export(eagle_config=[1])), "bench", RUN, "--draft", EXPORT),
        ("export/sglang/config.json: eagle_config", "[1] is not an object", "export"),
    ),
    BadInput(
        "export of other captured layers",
        _finished(
            _foreign(_export(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1]})),
            "bench",
            RUN,
            "--draft",
            EXPORT,
        ),
        ("export/sglang/model.safetensors", "fc.weight", "expected [32, 64]", "export"),
    ),
    BadInput(
        "export nested without end",
        _finished(_foreign(lambda w: w.write(f"{EXPORT}/config.json", "[" * 100_000)), "bench", RUN, "--draft", EXPORT),
        ("export/sglang/config.json", "not JSON", "nested", "export"),
    ),
    BadInput(
        "export of integers",
        _finished(_foreign(_export_of_integers), "bench", RUN, "--draft", EXPORT),
        ("export/sglang/model.safetensors", "fc.weight holds I64", "export"),
    ),
    BadInput(
        "export lacks a weight",
        _finished(_foreign(_export_without("fc.weight")), "bench", RUN, "--draft", EXPORT),
        ("export/sglang/model.safetensors", "fc.weight is missing", "export"),
    ),
    BadInput(
        "export of another shape",
        _finished(_foreign(_export_reshaped), "bench", RUN, "--draft", EXPORT),
        ("export/sglang/model.safetensors", "fc.weight is [2, 2], expected", "export"),
    ),
    BadInput(
        "export of another vocabulary",
        _finished(_foreign(_export(vocab_size=999)), "bench", RUN, "--draft", EXPORT),
        ("export/sglang/config.json", "vocabulary of 999", "use the target"),
    ),
    BadInput(
        "export cut short",
        _finished(_foreign(lambda w: cut(w.root / EXPORT / "model.safetensors")), "bench", RUN, "--draft", EXPORT),
        ("export/sglang/model.safetensors", "unreadable weights", "export"),
    ),
    BadInput(
        "export altered since it was written",
        _finished(_export(rms_norm_eps=1e-5), "bench", RUN, "--draft", EXPORT),
        ("export/sglang/config.json", "altered since it was exported", "export the draft again"),
    ),
    # evaluation, bench, report
    BadInput(
        "evaluation without held-out prompts",
        _finished(lambda w: w.without_prompts(), "eval", "run.yaml"),
        ("data.eval", "no held-out prompts", "name"),
    ),
    BadInput(
        "evaluation on what was not captured",
        _finished(lambda w: w.write("more.jsonl", w.model.train.read_text()), "eval", RUN, "data.eval=[more.jsonl]"),
        ("features/eval", "something else", "prompts: captured with"),
        changes=("run/features/eval/prompts/*",),
    ),
    BadInput(
        "bench without held-out prompts",
        _finished(lambda w: w.without_prompts(), "bench", "run.yaml"),
        ("data.eval", "no held-out prompts", "name"),
    ),
    BadInput(
        "bench of prompts that begin with what is trained",
        _finished(_trained_from_the_first_token, "bench", RUN, "data.eval=[eval.jsonl]"),
        ("data.eval", "nothing to decode from", "set bench.prompt_tokens"),
        changes=("run/features/eval/prompts/*",),
    ),
    BadInput(
        "bench result cannot be written",
        _finished(_directory_for_file("bench.json"), "bench", RUN),
        ("run/bench.json", "cannot be written"),
    ),
    BadInput(
        "metrics with text for a number",
        _finished(lambda w: w.write(f"{RUN}/metrics.jsonl", [{"step": 1, "loss": "low"}]), "report", RUN),
        ("run/metrics.jsonl:1", "loss", "remove the line"),
    ),
    BadInput(
        "bench result with markup for a number",
        _finished(lambda w: w.write(f"{RUN}/bench.json", json.dumps({**_BENCH, "prompts": "<b>"})), "report", RUN),
        ("run/bench.json: prompts", "'<b>' is not a whole number", "remove it"),
    ),
    BadInput(
        "bench result with a list for a speed",
        _finished(lambda w: w.write(f"{RUN}/bench.json", json.dumps({**_BENCH, "speedup": [1]})), "report", RUN),
        ("run/bench.json: speedup", "[1] is not an object", "remove it"),
    ),
    BadInput(
        "metrics with a step that is none",
        _finished(lambda w: w.write(f"{RUN}/metrics.jsonl", '{"step": 1e400}\n'), "report", RUN),
        ("run/metrics.jsonl:1", "no record of a step", "remove the line"),
    ),
    BadInput(
        "provenance nested without end",
        _finished(lambda w: w.write(f"{RUN}/provenance.json", "[" * 100_000), "report", RUN),
        ("run/provenance.json", "not JSON", "nested", "remove it"),
    ),
    BadInput(
        "resolved run file that refers to itself",
        _finished(lambda w: w.write(f"{RUN}/config.yaml", "a: &a [*a]\n"), "report", RUN),
        ("run/config.yaml", "aliases", "writes it again"),
    ),
    BadInput(
        "resolved run file behind a link",
        _finished(_link("config.yaml"), "report", RUN),
        ("run/config.yaml", "symbolic link", "writes it again"),
    ),
    BadInput(
        "feature manifest of other kinds",
        _untrained(lambda w: change_json(w.root / RUN / "features/train/features.json", request=[1], target="<b>")),
        ("features/train", "request: captured with [1]", "target: captured with '<b>'", "choose another"),
    ),
    BadInput(
        "bench result without its numbers",
        _finished(lambda w: w.write(f"{RUN}/bench.json", "{}"), "report", RUN),
        ("run/bench.json", "remove it, or write it again"),
    ),
    BadInput("report on nothing", lambda w: ["report", "gone"], ("gone", "no run", "name the run.directory")),
    BadInput(
        "report on a run file", lambda w: ["report", w.run_file()], ("run.yaml", "no run", "name the run.directory")
    ),
    BadInput(
        "metrics with a damaged line",
        _finished(lambda w: overwrite(w.root / RUN / "metrics.jsonl", 0, b"XX"), "report", RUN),
        ("run/metrics.jsonl:1", "damaged", "remove the line"),
    ),
    BadInput(
        "bench result is no JSON",
        _finished(lambda w: w.write(f"{RUN}/bench.json", "{"), "report", RUN),
        ("run/bench.json", "not JSON", "remove it"),
    ),
    BadInput(
        "resolved run file is no YAML",
        _finished(lambda w: w.write(f"{RUN}/config.yaml", "a: [b"), "report", RUN),
        ("run/config.yaml", "YAML", "writes it again"),
    ),
    BadInput(
        "resolved run file of aliases",
        _finished(lambda w: w.write(f"{RUN}/config.yaml", "a: &x [1]\nb: *x\n"), "report", RUN),
        ("run/config.yaml", "no aliases", "writes it again"),
    ),
    BadInput(
        "report's place is a link",
        _finished(_report_elsewhere, "report", RUN),
        ("run/report", "symbolic link", "cannot be written"),
    ),
    BadInput(
        "report cannot be written",
        _finished(_file_for_directory("report"), "report", RUN),
        ("run/report", "cannot be written"),
    ),
    BadInput(
        "store's place is a file",
        _untrained(_file_for_directory("features/train/store")),
        ("run/features/train/store", "cannot be opened", "Not a directory"),
    ),
    # the machine
    BadInput(
        "run in use by training",
        _finished(_lock("train"), "train", "run.yaml"),
        ("run", "another process (pid 4242) is running the train role", "choose another run.directory"),
    ),
    BadInput(
        "run in use by another run command",
        _finished(_lock("run"), "run", "run.yaml"),
        ("run", "another process (pid 4242) is running this run", "choose another run.directory"),
    ),
    BadInput(
        "metrics cannot be written",
        _untrained(_directory_for_file("metrics.jsonl")),
        ("run/metrics.jsonl", "cannot be"),
    ),
    BadInput(
        "checkpoints cannot be written",
        _untrained(_file_for_directory("checkpoints")),
        ("run/checkpoints", "cannot be written", "make it writable"),
    ),
]

NO_CUDA = [
    BadInput(
        "train on CUDA where there is none",
        _untrained(_nothing, "train", "run.yaml", "training.device=cuda"),
        ("training.device", "'cuda' cannot be used", "cpu works everywhere"),
    ),
    BadInput(
        "capture on CUDA where there is none",
        lambda w: ["capture", w.run_file(target={"device": "cuda"})],
        ("target.device", "'cuda' cannot be used", "cpu works everywhere"),
    ),
    BadInput(
        "evaluation on CUDA where there is none",
        _finished(_nothing, "eval", RUN, "training.device=cuda:0"),
        ("training.device", "'cuda:0' cannot be used", "cpu works everywhere"),
    ),
]
if not torch.cuda.is_available():
    TABLE += NO_CUDA
