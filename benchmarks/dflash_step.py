# SPDX-License-Identifier: Apache-2.0
"""One DFlash (or Domino) training step against ``speculators`` 0.9.0, alternating in one run.

    python benchmarks/dflash_step.py --peer-python PEER_VENV/bin/python [--strategy domino] [--mode 30%]
    python benchmarks/dflash_step.py --device cuda --dtype bfloat16 --shape qwen3-8b

The peer lives in its own environment (see benchmarks/README.md). Each side is a process that waits on its standard
input while the other works. Both get hidden 512, 4 layers of 8 heads, intermediate 1536, blocks of 16, 64 anchors in
each of 2 samples of 512 tokens, vocabulary 32,000 (or the sizes of the recipe for Qwen3-8B), the same trainable
parameters (embedding and head frozen) and optimizer (AdamW). Ours is the cross-entropy of the next tokens, as DFlash
trains; the peer's is a cross-entropy of the target's logits at the same places, which it computes besides. The peer has
no Domino; that is measured alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from alternation import StepBenchmark, run

BLOCK, GAMMA = 16, 7.0
MODES = ("all", "30%")


@dataclass(frozen=True)
class Shape:
    """Sizes of target, draft and micro-batch."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    intermediate: int
    vocab: int
    aux_layers: tuple[int, ...]
    samples: int
    length: int
    anchors: int


SHAPES = {
    "small": Shape(512, 4, 8, 8, 1536, 32_000, (1, 5, 9, 13), samples=2, length=512, anchors=64),
    "qwen3-8b": Shape(4096, 5, 32, 8, 12_288, 151_936, (1, 9, 17, 25, 33), samples=2, length=2048, anchors=256),
}


def make_mask(mode: str, options: argparse.Namespace):
    """One contiguous response at each sample's end, or all of it."""
    import torch

    shape = SHAPES[options.shape]
    mask = torch.zeros(shape.samples, shape.length, dtype=torch.bool, device=options.device)
    mask[:, 0 if mode == "all" else shape.length - int(0.3 * shape.length) :] = True
    return mask


def make_data(options: argparse.Namespace) -> dict:
    """The same features for both sides; fp32."""
    import torch

    torch.manual_seed(0)
    shape, device = SHAPES[options.shape], options.device
    rows = shape.samples, shape.length
    return {
        "head": torch.randn(shape.vocab, shape.hidden, device=device) * 0.05,
        "embedding": torch.randn(shape.vocab, shape.hidden, device=device) * 0.05,
        "input_ids": torch.randint(0, shape.vocab, rows, device=device),
        "aux": torch.randn(*rows, len(shape.aux_layers), shape.hidden, device=device),
        "last": torch.randn(*rows, shape.hidden, device=device),
    }


class Source:
    """What ours asks of a target."""

    def __init__(self, data: dict, shape: Shape) -> None:
        from specforge_core.contracts import TargetInfo

        self.data = data
        self.info = TargetInfo(
            name_or_path="benchmark",
            architecture="Qwen3ForCausalLM",
            num_layers=37,
            hidden_size=shape.hidden,
            vocab_size=shape.vocab,
            dtype="float32",
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_heads,
            head_dim=shape.hidden // shape.heads,
            rms_norm_eps=1e-6,
            max_position_embeddings=4 * shape.length,
            rope_parameters={"rope_theta": 10000.0},
        )

    def frozen_weights(self, names):
        return {"embed_tokens.weight": self.data["embedding"], "lm_head.weight": self.data["head"]}


def make_ours(options: argparse.Namespace) -> Callable[[str], float]:
    """A function that does one step in a mode and returns the loss."""
    import torch
    from specforge_core.contracts import Sample, StepContext
    from specforge_core.training.optimizer import DraftOptimizer

    shape = SHAPES[options.shape]
    settings = {
        "block_size": BLOCK,
        "num_anchors": shape.anchors,
        "num_layers": shape.layers,
        "aux_layer_ids": shape.aux_layers,
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
    data, dtype = make_data(options), getattr(torch, options.dtype)
    draft = strategy.build_draft(Source(data, shape)).to(options.device)
    del data["embedding"], data["head"]
    draft.to(dtype)
    optimizer = DraftOptimizer(draft, weight_decay=0.0)
    aux = data.pop("aux").to(dtype)

    def collate(mode: str):
        mask = make_mask(mode, options)
        features = [
            {"input_ids": data["input_ids"][i], "loss_mask": mask[i], "aux_hidden_states": aux[i]}
            for i in range(shape.samples)
        ]
        return strategy.collate([Sample(str(i), 0, f) for i, f in enumerate(features)], range(shape.samples))

    def step(mode: str) -> float:
        batch = collate(mode).to(options.device)
        optimizer.clear_gradients()
        context = StepContext(step=25, total_steps=100, denominators=batch.denominators)
        (term,) = strategy.loss(draft, batch, context).terms
        loss = term.numerator / batch.denominators[term.denominator]
        loss.backward()
        optimizer.gradients()
        optimizer.step(1e-4)
        return loss.item()

    return step


def make_peer(options: argparse.Namespace) -> Callable[[str], float]:
    """The same step by speculators: on CPU with sdpa attention and eager losses, which is what works there."""
    import torch
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.losses import resolve_loss_config
    from speculators.models.dflash import DFlashSpeculatorConfig
    from speculators.models.dflash.core import DFlashDraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import Qwen3Config

    shape, dtype, on_cpu = SHAPES[options.shape], getattr(torch, options.dtype), options.device == "cpu"
    layer = Qwen3Config(
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.hidden // shape.heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        num_hidden_layers=shape.layers,
        rms_norm_eps=1e-6,
        max_position_embeddings=4 * shape.length,
    )
    if on_cpu:
        layer._attn_implementation = "sdpa"
    verifier = VerifierConfig(name_or_path=None, architectures=["Qwen3ForCausalLM"])
    proposal = GreedyTokenProposalConfig(speculative_tokens=BLOCK - 1)
    model = DFlashDraftModel(
        DFlashSpeculatorConfig(
            transformer_layer_config=layer,
            draft_vocab_size=shape.vocab,
            block_size=BLOCK,
            mask_token_id=shape.vocab - 1,
            aux_hidden_state_layer_ids=[layer_id + 1 for layer_id in shape.aux_layers],
            speculators_config=SpeculatorsConfig(
                algorithm="dflash",
                proposal_methods=[proposal],
                default_proposal_method="greedy",
                verifier=verifier,
            ),
        )
    )
    data = make_data(options)
    model.to(options.device)
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
    model.to(dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    packed = {
        "hidden_states": data["aux"].flatten(2).flatten(0, 1).unsqueeze(0).to(dtype),
        "input_ids": data["input_ids"].flatten().unsqueeze(0),
        "verifier_last_hidden_states": data["last"].flatten(0, 1).unsqueeze(0).to(dtype),
        "document_ids": torch.arange(shape.samples).repeat_interleave(shape.length).unsqueeze(0).to(options.device),
        "position_ids": torch.arange(shape.length).repeat(shape.samples).unsqueeze(0).to(options.device),
    }
    losses = resolve_loss_config("ce", implementation="eager" if on_cpu else "auto")

    def step(mode: str) -> float:
        _, loss, _ = model(
            **packed,
            loss_mask=make_mask(mode, options).flatten().unsqueeze(0).float(),
            loss_config=losses,
            gamma=GAMMA,
            max_anchors=shape.anchors * shape.samples,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--strategy", choices=("dflash", "domino"), default="dflash")
    strategy = parser.parse_known_args()[0].strategy
    peer = {"peer": make_peer} if strategy == "dflash" else {}  # the peer has no correction head
    benchmark = StepBenchmark(
        script=__file__,
        title=strategy,
        modes=MODES,
        tokens_per_step=lambda options: SHAPES[options.shape].samples * SHAPES[options.shape].length,
        sides={"ours": make_ours, **peer},
    )
    run(benchmark, parser)


if __name__ == "__main__":
    main()
