# SPDX-License-Identifier: Apache-2.0
"""Bad run files, overrides and command lines."""

from __future__ import annotations

from bad_input import BadInput, Workshop


def _over(*overrides: str):
    """`plan` with overrides of a run file that works."""
    return lambda w: ["plan", w.run_file(), *overrides]


def _no_directory(w: Workshop) -> list[str]:
    (w.root / "folder").mkdir()
    return ["train", "folder"]


TABLE = [
    # the file itself
    BadInput("run file missing", lambda w: ["plan", "gone.yaml"], ("gone.yaml", "no such run file", "specforge init")),
    BadInput("run file is a directory", _no_directory, ("folder", "is no run", "name a run file")),
    BadInput("run file empty", lambda w: ["capture", w.write("a.yaml", "")], ("a.yaml", "is empty", "specforge init")),
    BadInput(
        "run file is no YAML",
        lambda w: ["run", w.write("a.yaml", "run:\n  directory: [a\ndata: 1\n")],
        ("a.yaml (line 3, column 5)", "not valid YAML"),
    ),
    BadInput(
        "run file is not UTF-8", lambda w: ["train", w.write("a.yaml", b"run: \xff\n")], ("a.yaml", "is not UTF-8", "5")
    ),
    BadInput(
        "key stands twice",
        lambda w: ["plan", w.edited_run_file("  epochs: 1\n", "  epochs: 1\n  epochs: 2\n")],
        ("run.yaml (line ", "'epochs' stands twice", "keep one"),
    ),
    BadInput(
        "top level is a list", lambda w: ["plan", w.write("a.yaml", "- run\n")], ("a.yaml", "holds a list", "training:")
    ),
    # keys
    BadInput(
        "unknown key",
        lambda w: ["capture", w.run_file(training={"learning_rat": 0.1})],
        ("run.yaml: training.learning_rat (line ", "unknown key", "did you mean 'learning_rate'?"),
    ),
    BadInput(
        "unknown section",
        lambda w: ["plan", w.run_file(trainin={"epochs": 1})],
        ("run.yaml: trainin (line ", "unknown section", "did you mean 'training'?"),
    ),
    BadInput(
        "key in the wrong section",
        lambda w: ["plan", w.run_file(run={"epochs": 1})],
        ("run.yaml: run.epochs", "did you mean 'training.epochs'?"),
    ),
    BadInput(
        "section missing", lambda w: ["plan", w.run_file(run=None)], ("run.yaml: run", "is missing and has no default")
    ),
    BadInput(
        "key missing",
        lambda w: ["plan", w.run_file(data={"train": None})],
        ("run.yaml: data.train", "is missing and has no default"),
    ),
    BadInput(
        "word for a number",
        lambda w: ["train", w.run_file(training={"epochs": "many"})],
        ("run.yaml: training.epochs (line ", "valid integer", "'many'"),
    ),
    BadInput(
        "negative number",
        lambda w: ["plan", w.run_file(training={"global_batch_size": -8})],
        ("run.yaml: training.global_batch_size (line ", "greater than or equal to 1", "-8"),
    ),
    BadInput(
        "text for a list",
        lambda w: ["plan", w.run_file(data={"train": "a.jsonl"})],
        ("run.yaml: data.train (line ", "must be a list, like [a, b]", "'a.jsonl'"),
    ),
    BadInput(
        "text for a section",
        lambda w: ["plan", w.run_file(strategy="eagle3")],
        ("run.yaml: strategy (line ", "must be a section", "strategy: {name: eagle3}"),
    ),
    BadInput(
        "unknown topology",
        lambda w: ["plan", w.run_file(topology="online")],
        ("run.yaml: topology (line ", "'offline', 'colocated' or 'disaggregated'", "'online'"),
    ),
    BadInput(
        "watermarks in the wrong order",
        lambda w: ["plan", w.run_file(capture={"low_watermark_windows": 9})],
        ("run.yaml: capture", "low_watermark_windows must be below high_watermark_windows"),
    ),
    BadInput(
        "several at once",
        lambda w: ["plan", w.run_file(training={"epochs": 0, "shufle": True}, bench={"prompts": "x"})],
        ("3 problems", "training.epochs (line", "training.shufle (line", "'shuffle'", "bench.prompts (line"),
    ),
    BadInput(
        "key of a plugin's section unknown",
        lambda w: ["plan", w.run_file(strategy={"ttt_step": 2})],
        ("run.yaml: strategy.ttt_step (line ", "unknown key", "did you mean 'ttt_steps'?"),
    ),
    BadInput(
        "key of a plugin's section out of range",
        lambda w: ["plan", w.run_file(strategy={"ttt_steps": 0})],
        ("run.yaml: strategy.ttt_steps (line ", "greater than or equal to 1", "got 0"),
    ),
    BadInput(
        "key that is no text",
        lambda w: ["plan", w.edited_run_file("topology: offline", "1: offline")],
        ("run.yaml", "1", "key"),
    ),
    BadInput(
        "section left empty",
        lambda w: ["plan", w.edited_run_file("topology: offline", "evaluation:")],
        ("run.yaml: evaluation (line ", "must be a section", "got None"),
    ),
    BadInput(
        "YAML that constructs objects",
        lambda w: ["plan", w.edited_run_file("topology: offline", "topology: !!python/name:os.system")],
        ("run.yaml (line ", "not valid YAML", "python/name"),
    ),
    BadInput(
        "alias that contains itself",
        lambda w: ["plan", w.write("a.yaml", "run: &a\n  b: *a\n")],
        ("a.yaml", "contains itself"),
    ),
    BadInput(
        "resolved run file edited",
        lambda w: ["plan", w.write("old/config.yaml", "dota: {}\n") and "old"],
        ("old/config.yaml", "dota (line 1)", "unknown section 'dota'", "did you mean 'data'?"),
    ),
    # overrides
    BadInput("override without a key", _over("=2"), ("override '=2'", "section.key=value", "e.g.")),
    BadInput(
        "override that is infinite", _over("training.learning_rate=.inf"), ("learning_rate=.inf'", "finite number")
    ),
    BadInput(
        "override that is no number", _over("training.learning_rate=.nan"), ("learning_rate=.nan'", "finite number")
    ),
    BadInput("override without =", _over("training.epochs"), ("'training.epochs'", "section.key=value", "e.g.")),
    BadInput("override of an unknown key", _over("training.epoch=2"), ("override 'training.epoch=2'", "'epochs'?")),
    BadInput(
        "override that is no YAML", _over("data.train=[a"), ("override 'data.train=[a'", "not valid YAML", "quote")
    ),
    BadInput("override of the wrong type", _over("run.seed=x"), ("override 'run.seed=x'", "valid integer", "'x'")),
    BadInput(
        "override through a value",
        _over("topology.kind=x"),
        ("override 'topology.kind=x'", "not a section", "topology=…"),
    ),
    # what does not fit together
    BadInput(
        "micro-batch larger than the window",
        _over("training.micro_batch_size=16"),
        ("'training.micro_batch_size=16'", "more than the 8 samples", "lower it or raise training.global_batch_size"),
    ),
    BadInput(
        "draft vocabulary larger than the target's",
        lambda w: ["capture", w.run_file(strategy={"draft_vocab_size": 99999})],
        ("run.yaml: strategy", "draft_vocab_size is 99999", "set a smaller one"),
    ),
    BadInput(
        "layer out of range",
        lambda w: ["run", w.run_file(strategy={"aux_layer_ids": [0, 2, 6]})],
        ("run.yaml: strategy", "aux_layer_ids", "layer 6 does not exist", "layers 0 to 5", "zero-based"),
    ),
    BadInput(
        "layer named twice",
        _over("strategy.aux_layer_ids=[1, 1, 2]"),
        ("strategy.aux_layer_ids", "named twice", "[1, 1, 2]"),
    ),
    BadInput(
        "longer than the target's positions",
        _over("data.max_length=4096"),
        ("'data.max_length=4096'", "512 positions", "set"),
    ),
    BadInput(
        "offline run in memory",
        lambda w: ["capture", w.run_file(store={"name": "memory"})],
        ("run.yaml: store.name (line ", "'memory' is not cross-process and durable", "use store: {name: file}"),
    ),
    BadInput(
        "offline run with a channel in memory",
        _over("channel.name=memory"),
        ("'channel.name=memory'", "'memory' is not durable", "use channel: {name: file}"),
    ),
    BadInput(
        "feature directory for an online run",
        _over("topology=colocated", "data.features=there"),
        ("'data.features=there'", "only `topology: offline` keeps features", "leave it out"),
    ),
    BadInput(
        "byte limit below two windows",
        _over("topology=colocated", "capture.high_watermark_bytes=1000"),
        ("'capture.high_watermark_bytes=1000'", "less than two windows", "raise it"),
    ),
    BadInput(
        "evaluation of nothing",
        lambda w: ["train", w.without_prompts(), "evaluation.every_steps=1"],
        ("'evaluation.every_steps=1'", "nothing to evaluate on", "data.eval"),
    ),
    BadInput("device that is none", _over("training.device=gpu"), ("'training.device=gpu'", "not cpu, cuda or cuda:N")),
    BadInput(
        "training data missing", _over("data.train=[gone.jsonl]"), ("data.train=[gone", "does not exist", "relative")
    ),
    BadInput(
        "run.directory is a file",
        lambda w: ["capture", w.run_file(run={"directory": w.write("file", "x")})],
        ("run.yaml: run.directory (line ", "file is a file", "name a directory"),
    ),
    BadInput(
        "run.directory below a file",
        lambda w: ["capture", w.run_file(run={"directory": w.write("file", "x") + "/run"})],
        ("file/run", "prompts cannot be written: Not a directory", "choose another run directory"),
    ),
    BadInput(
        "store.path is a file",
        lambda w: ["capture", w.run_file(store={"name": "file", "path": w.write("file", "x")})],
        ("file: cannot be opened: Not a directory", "check store.path"),
    ),
    BadInput(
        "channel.path is a file",
        lambda w: ["capture", w.run_file(channel={"name": "file", "path": w.write("file", "x")}), "data.eval=[]"],
        (".refs: cannot be written", "check channel.path"),
    ),
    BadInput(
        "data.features is a file",
        lambda w: ["plan", w.run_file(data={"features": w.write("file", "x")})],
        ("run.yaml: data.features (line ", "file is a file", "name a directory"),
    ),
    BadInput(
        "half of a colocated run: train",
        lambda w: ["train", w.run_file(topology="colocated")],
        ("topology", "one half of a colocated run", "use `specforge run`"),
    ),
    BadInput(
        "half of a colocated run: capture",
        lambda w: ["capture", w.run_file(topology="colocated")],
        ("topology", "one half of a colocated run", "use `specforge run`"),
    ),
    BadInput(
        "disaggregated run with a store in memory",
        lambda w: ["run", w.run_file(topology="disaggregated", store={"name": "memory"})],
        ("run.yaml: store.name (line ", "'memory' is not cross-process", "use store: {name: file}"),
    ),
    BadInput(
        "window too small for a capture batch",
        _over("topology=disaggregated", "capture.batch_size=64"),
        ("capture.high_watermark_windows", "4 windows of 8", "capture batch of 64", "lower capture.batch_size"),
    ),
    BadInput(
        "token file missing",
        lambda w: ["capture", w.run_file(run={"token_file": "gone"})],
        ("run.token_file", "gone is no file", "openssl rand"),
    ),
    BadInput(
        "token too short",
        lambda w: ["capture", w.run_file(run={"token_file": w.write("token", "secret")})],
        ("token: the token has 6 characters", "16 are the least"),
    ),
    BadInput(
        "id of the run with a path in it",
        _over("run.id=../other"),
        ("'run.id=../other'", "should match pattern"),
    ),
    # the command line itself
    BadInput(
        "argument too many",
        lambda w: ["schema", "run.yaml"],
        ("unexpected extra argument", "run.yaml", "specforge schema -h"),
    ),
    BadInput(
        "option out of range",
        lambda w: ["plugins", "check", "--deadline", "0"],
        ("--deadline", "0 is not above 0", "check -h"),
    ),
    BadInput(
        "starter file is a directory", lambda w: ["init", ".", "--force"], ("cannot be written", "Is a directory")
    ),
    BadInput("unknown command", lambda w: ["trian", "run.yaml"], ("no such command 'trian'", "did you mean 'train'?")),
    BadInput("unknown option", lambda w: ["train", w.run_file(), "--fast"], ("--fast", "No such option")),
    BadInput("no run named", lambda w: ["bench"], ("Missing argument", "RUN", "specforge bench -h")),
    BadInput(
        "starter file is there", lambda w: ["init", w.run_file()], ("run.yaml", "is there already", "say --force")
    ),
    BadInput("starter file into nowhere", lambda w: ["init", "no/run.yaml"], ("no/run.yaml", "No such file")),
    BadInput("schema of a plugin that is none", lambda w: ["--no-plugin", "eagle", "schema"], ("'eagle'", "'eagle3'?")),
]
