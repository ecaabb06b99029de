# SPDX-License-Identifier: Apache-2.0
"""Exports in a real server: vLLM on CPU emits what the target alone emits, and accepts what our own bench accepts.

A server that misses a weight, or reads another layer than the one trained on, still serves; it only accepts less. So
loading proves nothing, and equality of the acceptance counts at every draft position proves everything. Both sides
compute in float32 and decode greedily, one request at a time, so the counts are the same integers: a tie would have to
lie within float32 rounding to make a difference.

Deselected unless asked for with ``-m server`` (see ``make test-server``); ``SPECFORGE_VLLM_PYTHON`` names the Python
of an environment that has vLLM. Every wait has a deadline, and no process outlives its call.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import start
from specforge_core.config.load import load_run_config
from specforge_core.config.plan import compose
from specforge_core.contracts import CaptureRequest, SilentProgress, StopSignal
from specforge_core.decoding.bench import cut_prompts
from specforge_core.decoding.speculative import DecodeLimits, DecodeResult, plain_decode
from specforge_core.hooks.descriptors import DemoTarget
from specforge_core.hooks.manager import PluginRegistry
from specforge_core.run.assemble import Run
from specforge_core.run.directory import run_file_of
from specforge_hf_target.demo_target import prepare_within
from specforge_hf_target.demo_training import DemoBudget

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

MAX_NEW_TOKENS = 48
COMMAND_SECONDS = SERVER_SECONDS = 600
BUDGET = DemoBudget(
    vocab_size=1024,
    hidden_size=128,
    num_layers=4,
    steps=300,
    answered_prompts=256,
    held_out_prompts=12,
    answer_tokens=64,
    max_files=80,
    threads=1,
)
BLOCK = {"block_size": 5, "num_anchors": 48, "num_layers": 2, "aux_layer_ids": [0, 1, 2]}
STRATEGIES: dict[str, dict[str, Any]] = {
    "eagle3": {"ttt_steps": 3, "draft_vocab_size": 512, "aux_layer_ids": [0, 1, 2]},
    "dflash": BLOCK,
    "domino": {**BLOCK, "emb_dim": 32, "gru_hidden_dim": 64},
}


@dataclass(frozen=True)
class Trained:
    """A run with a trained draft, and what the target alone says to the prompts of its bench."""

    name: str
    directory: Path
    target: str
    prompts: list[list[int]]
    outputs: list[list[int]]
    stop: list[int]


@pytest.fixture(scope="session")
def vllm_python() -> str:
    named = os.environ.get("SPECFORGE_VLLM_PYTHON", "")
    if not named:
        pytest.skip("SPECFORGE_VLLM_PYTHON names no Python that has vLLM; run `make test-server`")
    return named


@pytest.fixture(scope="session")
def demo_target(tmp_path_factory: pytest.TempPathFactory) -> DemoTarget:
    """A small target that learned something real, so that drafts of it are accepted now and then."""
    return prepare_within(tmp_path_factory.mktemp("demo"), budget=BUDGET, progress=SilentProgress())


@pytest.fixture(scope="session")
def train(demo_target: DemoTarget, tmp_path_factory: pytest.TempPathFactory):
    """Trains a strategy's draft, once."""
    done: dict[str, Trained] = {}

    def trained(name: str) -> Trained:
        if name not in done:
            done[name] = train_draft(name, demo_target, tmp_path_factory.mktemp(name))
        return done[name]

    return trained


def specforge(root: Path, *arguments: str) -> str:
    """What the command prints; it must succeed."""
    process = start(*arguments, cwd=root)
    try:
        out, err = process.communicate(timeout=COMMAND_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out.strip()


def train_draft(name: str, target: DemoTarget, root: Path) -> Trained:
    directory = root / "run"
    values = {
        "run": {"directory": str(directory), "seed": 0},
        "target": {"name": "hf", **target.section},
        "strategy": {"name": name, **STRATEGIES[name]},
        "data": {"train": [str(target.train_prompts)], "eval": [str(target.eval_prompts)], "max_length": 160},
        "capture": {"batch_size": 16, "threads": 1},
        "training": {
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "epochs": 4,
            "learning_rate": 2e-3,
            "threads": 1,
        },
        "bench": {"prompts": 8, "max_new_tokens": MAX_NEW_TOKENS, "threads": 1},
        "regenerate": {"output": str(root / "answers"), "max_tokens": target.answer_tokens},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(values))
    for split in ("train", "eval"):
        specforge(root, "regenerate", "run.yaml", "--split", split)
    answers = [f"data.{split}=[{root / 'answers' / split}]" for split in ("train", "eval")]
    specforge(root, "run", "run.yaml", *answers)
    return Trained(name, directory, target.section["path"], *decode_alone(directory))


def decode_alone(directory: Path) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """The prompts that the bench decodes, what our target says to them, and the tokens that end an output."""
    plan = compose(load_run_config(run_file_of(directory), []), PluginRegistry.discover())
    run = Run(plan, stop=StopSignal(), progress=lambda half: SilentProgress(), observers=[])
    try:
        prompts = [list(prompt.input_ids) for prompt in cut_prompts(run.prompts("eval"), plan.config.bench)]
        limits = DecodeLimits(MAX_NEW_TOKENS, plan.info.eos_token_ids)
        decoder = run.engine.decoder(CaptureRequest())
        outputs = [plain_decode(decoder, prompt, limits=limits).token_ids for prompt in prompts]
    finally:
        run.close()
    return prompts, outputs, list(plan.info.eos_token_ids)


def serve(python: str, trained: Trained, root: Path, *, model: str, speculative: dict[str, Any] | None) -> Any:
    """The bench's prompts through vLLM, in a process of its own that ends with this call."""
    job = {
        "model": model,
        "speculative": speculative,
        "prompts": trained.prompts,
        "max_tokens": MAX_NEW_TOKENS,
        "stop": trained.stop,
    }
    (root / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("vllm_decode.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (root / "server.log").open("w") as log:
        done = subprocess.run(
            [python, str(script), "job.json", "result.json"],
            cwd=root,
            env=environment,
            stdout=log,
            stderr=log,
            timeout=SERVER_SECONDS,
        )
    assert done.returncode == 0, (root / "server.log").read_text()[-4000:]
    return json.loads((root / "result.json").read_text())


def count_passes(outputs: list[dict[str, Any]], draft_tokens: int) -> DecodeResult:
    """vLLM's passes, counted as our bench counts.

    vLLM drafts and counts past the end of an output; we propose no more than can still be emitted, and past an
    end-of-sequence token nobody knows what would have been accepted.
    """
    total = DecodeResult()
    for output in outputs:
        (emitted, first), *passes = output["passes"]
        assert (emitted, first) == (1, None), "the prefill emits one token and verifies nothing"
        for tokens, accepted in passes:
            assert accepted is not None, "a pass without a proposal"
            proposed = min(draft_tokens, MAX_NEW_TOKENS - emitted - 1)
            accepted = min(accepted, proposed)
            total.count(tokens if tokens <= accepted else proposed, min(accepted, tokens))
            total.target_passes += 1
            emitted += tokens
    return total


def test_the_target_alone_says_the_same_in_vllm(vllm_python, train, tmp_path):
    trained = train("eagle3")
    result = serve(vllm_python, trained, tmp_path, model=trained.target, speculative=None)
    assert [output["token_ids"] for output in result["outputs"]] == trained.outputs


@pytest.mark.parametrize("format", ["sglang", "speculators"])
@pytest.mark.parametrize("name", ["eagle3", "dflash"])
def test_vllm_accepts_what_our_bench_accepts(vllm_python, train, tmp_path, name, format):
    trained = train(name)
    export = specforge(trained.directory.parent, "export", str(trained.directory), "--format", format)
    bench = json.loads(
        specforge(trained.directory.parent, "bench", str(trained.directory), "--draft", export, "--json")
    )
    draft_tokens = bench["draft_tokens"]
    if format == "speculators":  # such a directory is served by its own name, and says the rest itself
        result = serve(vllm_python, trained, tmp_path, model=export, speculative=None)
    else:
        setting = {"method": name, "model": export, "num_speculative_tokens": draft_tokens}
        result = serve(vllm_python, trained, tmp_path, model=trained.target, speculative=setting)

    assert [output["token_ids"] for output in result["outputs"]] == trained.outputs
    counted = count_passes(result["outputs"], draft_tokens)
    expected = [
        round(rate * proposed)
        for rate, proposed in zip(bench["position_acceptance"], bench["position_proposed"], strict=True)
    ]
    print(f"\n{name} as {format}: accepted {counted.accepted} of {counted.proposed}; our bench {expected}")
    assert counted.proposed == bench["position_proposed"]
    assert counted.accepted == expected
    assert counted.target_passes == bench["target_passes"]
    assert expected[0] > 0.2 * bench["position_proposed"][0], "a draft that is never accepted proves nothing"


def test_domino_trains_and_decodes_losslessly(train):
    """vLLM knows no correction head (it would read this export as a DFlash draft), so Domino meets our bench alone."""
    trained = train("domino")
    root = trained.directory.parent
    export = specforge(root, "export", str(trained.directory))
    bench = json.loads(specforge(root, "bench", str(trained.directory), "--draft", export, "--json"))
    assert bench["lossless"] is True
    assert bench["acceptance_length"] > 1.2
    refused = start("export", str(trained.directory), "--format", "speculators", cwd=root)
    _, err = refused.communicate(timeout=COMMAND_SECONDS)
    assert refused.returncode == 2
    assert "does not write 'speculators'" in err
