# SPDX-License-Identifier: Apache-2.0
"""One DFlash (or Domino) training step against ``speculators`` 0.9.0, alternating in one run.

    python benchmarks/dflash_step.py --peer-python PEER_VENV/bin/python [--strategy domino] [--mode 30%]

The peer lives in its own environment (see benchmarks/README.md). Each side is a process that waits on its standard
input while the other works. Both get hidden 512, 4 layers of 8 heads, intermediate 1536, blocks of 16, 64 anchors in
each of 2 samples of 512 tokens, vocabulary 32,000, the same trainable parameters (embedding and head frozen) and
optimizer (AdamW). Ours is the cross-entropy of the next tokens, as DFlash trains; the peer's is a cross-entropy of the
target's logits at the same places, which it computes besides. The peer has no Domino; that is measured alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HIDDEN, LAYERS, HEADS, INTERMEDIATE, VOCAB = 512, 4, 8, 1536, 32_000
SAMPLES, LENGTH, BLOCK, ANCHORS = 2, 512, 16, 64
AUX_LAYERS, GAMMA = (1, 5, 9, 13), 7.0
MODES = ("all", "30%")


def make_mask(mode: str):
    """One contiguous response at each sample's end, or all of it."""
    import torch

    mask = torch.zeros(SAMPLES, LENGTH, dtype=torch.bool)
    mask[:, 0 if mode == "all" else LENGTH - int(0.3 * LENGTH) :] = True
    return mask


def make_data() -> dict:
    """The same features for both sides; fp32."""
    import torch

    torch.manual_seed(0)
    return {
        "head": torch.randn(VOCAB, HIDDEN) * 0.05,
        "embedding": torch.randn(VOCAB, HIDDEN) * 0.05,
        "input_ids": torch.randint(0, VOCAB, (SAMPLES, LENGTH)),
        "aux": torch.randn(SAMPLES, LENGTH, len(AUX_LAYERS), HIDDEN),
        "last": torch.randn(SAMPLES, LENGTH, HIDDEN),
    }


class Source:
    """What ours asks of a target."""

    def __init__(self, data: dict) -> None:
        from specforge_core.contracts import TargetInfo

        self.data = data
        self.info = TargetInfo(
            name_or_path="benchmark",
            architecture="Qwen3ForCausalLM",
            num_layers=17,
            hidden_size=HIDDEN,
            vocab_size=VOCAB,
            dtype="float32",
            intermediate_size=INTERMEDIATE,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=HIDDEN // HEADS,
            rms_norm_eps=1e-6,
            max_position_embeddings=4 * LENGTH,
            rope_parameters={"rope_theta": 10000.0},
        )

    def frozen_weights(self, names):
        return {"embed_tokens.weight": self.data["embedding"], "lm_head.weight": self.data["head"]}


def make_ours(options: argparse.Namespace) -> Callable[[str], float]:
    """A function that does one step in a mode and returns the loss."""
    import torch
    from specforge_core.contracts import Sample, StepContext

    settings = {
        "block_size": BLOCK,
        "num_anchors": ANCHORS,
        "num_layers": LAYERS,
        "aux_layer_ids": AUX_LAYERS,
        "loss_decay_gamma": GAMMA,
    }
    if options.strategy == "domino":
        from specforge_domino.config import DominoConfig
        from specforge_domino.strategy import DominoStrategy

        strategy = DominoStrategy(DominoConfig(**settings))
    else:
        from specforge_dflash.config import DflashConfig
        from specforge_dflash.strategy import DflashStrategy

        strategy = DflashStrategy(DflashConfig(**settings))
    data = make_data()
    draft = strategy.build_draft(Source(data))
    del data["embedding"], data["head"]
    masters = [parameter.detach().clone() for parameter in draft.parameters()] if options.dtype == "bfloat16" else []
    draft.to(getattr(torch, options.dtype))
    trained = list(draft.parameters())
    optimizer = torch.optim.AdamW(masters or trained, lr=1e-4, weight_decay=0.0)

    def collate(mode: str):
        mask = make_mask(mode)
        features = [
            {"input_ids": data["input_ids"][i], "loss_mask": mask[i], "aux_hidden_states": data["aux"][i]}
            for i in range(SAMPLES)
        ]
        return strategy.collate([Sample(str(i), 0, f) for i, f in enumerate(features)], range(SAMPLES))

    def step(mode: str) -> float:
        batch = collate(mode)
        context = StepContext(step=25, total_steps=100, denominators=batch.denominators)
        (term,) = strategy.loss(draft, batch, context).terms
        loss = term.numerator / batch.denominators[term.denominator]
        loss.backward()
        for master, parameter in zip(masters, trained, strict=False):
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        for master, parameter in zip(masters, trained, strict=False):
            parameter.data.copy_(master)
        optimizer.zero_grad()
        return loss.item()

    return step


def make_peer(options: argparse.Namespace) -> Callable[[str], float]:
    """The same step by speculators: sdpa attention and eager losses, which is what works on CPU."""
    import torch
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.losses import resolve_loss_config
    from speculators.models.dflash import DFlashSpeculatorConfig
    from speculators.models.dflash.core import DFlashDraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import Qwen3Config

    layer = Qwen3Config(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        intermediate_size=INTERMEDIATE,
        vocab_size=VOCAB,
        num_hidden_layers=LAYERS,
        rms_norm_eps=1e-6,
        max_position_embeddings=4 * LENGTH,
    )
    layer._attn_implementation = "sdpa"
    verifier = VerifierConfig(name_or_path=None, architectures=["Qwen3ForCausalLM"])
    proposal = GreedyTokenProposalConfig(speculative_tokens=BLOCK - 1)
    model = DFlashDraftModel(
        DFlashSpeculatorConfig(
            transformer_layer_config=layer,
            draft_vocab_size=VOCAB,
            block_size=BLOCK,
            mask_token_id=VOCAB - 1,
            aux_hidden_state_layer_ids=[layer_id + 1 for layer_id in AUX_LAYERS],
            speculators_config=SpeculatorsConfig(
                algorithm="dflash",
                proposal_methods=[proposal],
                default_proposal_method="greedy",
                verifier=verifier,
            ),
        )
    )
    data = make_data()
    with torch.no_grad():
        model.embed_tokens.weight.copy_(data["embedding"])
        model.lm_head.weight.copy_(data["head"])
        model.verifier_lm_head.weight.copy_(data["head"])
        model.verifier_norm.weight.fill_(1.0)
        for name, parameter in model.named_parameters():
            frozen = name.startswith(("embed", "verifier", "lm_head"))
            parameter.requires_grad_(not frozen)
            if parameter.dim() == 2 and not frozen:
                parameter.normal_(std=0.02)
    del data["embedding"], data["head"]
    model.to(getattr(torch, options.dtype))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    packed = {
        "hidden_states": data["aux"].flatten(2).flatten(0, 1).unsqueeze(0).to(getattr(torch, options.dtype)),
        "input_ids": data["input_ids"].flatten().unsqueeze(0),
        "verifier_last_hidden_states": data["last"].flatten(0, 1).unsqueeze(0).to(getattr(torch, options.dtype)),
        "document_ids": torch.arange(SAMPLES).repeat_interleave(LENGTH).unsqueeze(0),
        "position_ids": torch.arange(LENGTH).repeat(SAMPLES).unsqueeze(0),
    }
    losses = resolve_loss_config("ce", implementation="eager")

    def step(mode: str) -> float:
        _, loss, _ = model(
            **packed,
            loss_mask=make_mask(mode).flatten().unsqueeze(0).float(),
            loss_config=losses,
            gamma=GAMMA,
            max_anchors=ANCHORS * SAMPLES,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def work(side: str, options: argparse.Namespace) -> None:
    """A worker: reads one mode per line, does one step, answers with one JSON line."""
    import torch

    torch.set_num_threads(options.threads)
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = (make_ours if side == "ours" else make_peer)(options)
    print(json.dumps({"ready": True, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        answer = {"loss": step(line.strip()), "seconds": time.perf_counter() - begin}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({**answer, "peak_mb": peak / 1024, "imports_mb": imports / 1024}), flush=True)


@dataclass
class Side:
    """One worker process."""

    name: str
    process: subprocess.Popen

    @classmethod
    def start(cls, name: str, python: str, options: argparse.Namespace) -> Side:
        command = [python, __file__, "--worker", name, "--dtype", options.dtype, "--strategy", options.strategy]
        command += ["--threads", str(options.threads)]
        side = cls(name, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        side._answer()
        return side

    def ask(self, line: str) -> dict:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self.process.wait()}; its error stands above")
        return json.loads(line)


def measure(mode: str, options: argparse.Namespace) -> dict:
    """Alternate the sides, fresh processes per mode so that peak memory is the mode's own."""
    sides = [Side.start("ours", sys.executable, options)]
    if options.peer_python and options.strategy == "dflash":
        sides.append(Side.start("peer", options.peer_python, options))
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    result: dict = {"mode": mode, "strategy": options.strategy, "dtype": options.dtype}
    for turn in range(options.warmup + options.rounds):
        for side in sides:
            answer = side.ask(mode)
            if turn >= options.warmup:
                seconds[side.name].append(answer["seconds"])
            result[f"{side.name}_peak_mb"], result[f"{side.name}_imports_mb"] = answer["peak_mb"], answer["imports_mb"]
            result.setdefault(f"{side.name}_first_loss", answer["loss"])
            result[f"{side.name}_last_loss"] = answer["loss"]
    for side in sides:
        result[f"{side.name}_tokens_per_second"] = SAMPLES * LENGTH / statistics.median(seconds[side.name])
        side.process.stdin.close()
        side.process.wait(timeout=60)
    return result


def show(result: dict) -> None:
    print(f"{result['strategy']}, {result['dtype']}, {result['mode']} positions trained")
    for side in ("ours", "peer"):
        if f"{side}_peak_mb" in result:
            print(
                f"  {side}: {result[f'{side}_tokens_per_second']:7.0f} tokens/s,"
                f" peak {result[f'{side}_peak_mb']:.0f} MB (imports {result[f'{side}_imports_mb']:.0f}),"
                f" loss {result[f'{side}_first_loss']:.4f} -> {result[f'{side}_last_loss']:.4f}"
            )
    if "peer_peak_mb" in result:
        speed = result["ours_tokens_per_second"] / result["peer_tokens_per_second"]
        print(f"  ratio: {speed:.2f} x tokens/s, {result['ours_peak_mb'] / result['peer_peak_mb']:.2f} x peak memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="python of the environment that holds speculators; default: ours alone")
    parser.add_argument("--strategy", choices=("dflash", "domino"), default="dflash")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--mode", choices=MODES, action="append")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--worker", choices=("ours", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options)
        return
    results = []
    for mode in options.mode or MODES:
        results.append(measure(mode, options))
        show(results[-1])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
