# SPDX-License-Identifier: Apache-2.0
"""One EAGLE3 training step against ``speculators`` 0.9.0, alternating in one run.

    python benchmarks/eagle3_step.py --peer-python PEER_VENV/bin/python [--dtype bfloat16]
    python benchmarks/eagle3_step.py --device cuda --dtype bfloat16 --shape qwen3-8b

The peer lives in its own environment (see benchmarks/README.md). Each side is a process that waits on its standard
input while the other works. Both get the same weights' shapes, features, mask, unroll steps, trainable parameters
(draft head included; embedding and target head frozen) and optimizer (AdamW), one packed or batched micro-batch per
step: 1,024 tokens, or 4,096 in the sizes of the recipe for Qwen3-8B. The target's likeliest token is always in the
draft vocabulary, so "all trained" means all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from alternation import StepBenchmark, run

STEPS, DECAY = 7, 0.8
MODES = ("all", "30%")


@dataclass(frozen=True)
class Shape:
    """Sizes of target, draft and micro-batch."""

    hidden: int
    heads: int
    key_heads: int
    intermediate: int
    vocab: int
    draft_vocab: int
    samples: int
    length: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    "small": Shape(512, 8, 8, 1536, 32_000, 8_000, samples=2, length=512),
    "qwen3-8b": Shape(4096, 32, 8, 12_288, 151_936, 32_000, samples=2, length=2048),
}


def make_data(options: argparse.Namespace) -> dict:
    """The same features for both sides; fp32."""
    import torch

    torch.manual_seed(0)
    shape, device = SHAPES[options.shape], options.device
    rows = shape.samples, shape.length
    t2d = torch.zeros(shape.vocab, dtype=torch.bool, device=device)
    t2d[torch.randperm(shape.vocab, device=device)[: shape.draft_vocab]] = True
    head = torch.randn(shape.vocab, shape.hidden, device=device) * 0.1
    head[~t2d] *= 0.2
    return {
        "t2d": t2d,
        "d2t": t2d.nonzero().flatten() - torch.arange(shape.draft_vocab, device=device),
        "head": head,
        "embedding": torch.randn(shape.vocab, shape.hidden, device=device) * 0.05,
        "input_ids": torch.randint(0, shape.vocab, rows, device=device),
        "aux": torch.randn(*rows, 3, shape.hidden, device=device),
        "last": torch.randn(*rows, shape.hidden, device=device),
    }


def loss_mask(mode: str, options: argparse.Namespace):
    """One contiguous response at each sample's end, or all of it."""
    import torch

    shape = SHAPES[options.shape]
    mask = torch.zeros(shape.samples, shape.length, dtype=torch.bool, device=options.device)
    mask[:, 0 if mode == "all" else shape.length - int(0.3 * shape.length) :] = True
    return mask


def make_ours(options: argparse.Namespace) -> Callable[[str], float]:
    """A function that does one step in a mode and returns the loss."""
    import torch
    from specforge_core.modeling import VocabMap
    from specforge_core.training.optimizer import DraftOptimizer
    from specforge_eagle3.config import DraftShape
    from specforge_eagle3.draft_model import Eagle3Draft
    from specforge_eagle3.loss import StepWeights

    data, sizes, dtype = make_data(options), SHAPES[options.shape], getattr(torch, options.dtype)
    shape = DraftShape(
        vocab_size=sizes.vocab,
        draft_vocab_size=sizes.draft_vocab,
        hidden_size=sizes.hidden,
        target_hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        head_dim=sizes.head_dim,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_theta": 10000.0},
        last_hidden_norm="pre",
    )
    draft = Eagle3Draft(shape, VocabMap(data["t2d"], data["d2t"])).to(options.device)
    draft.embed_tokens.load(data["embedding"])
    draft.target_head.load(data["head"], torch.ones(sizes.hidden, device=options.device))
    del data["embedding"], data["head"]
    draft.to(dtype)
    optimizer = DraftOptimizer(draft, weight_decay=0.0)
    nothing = (0.0,) * STEPS
    weights = StepWeights(tuple(DECAY**k for k in range(STEPS)), nothing, nothing)
    features = {"aux_hidden_states": data["aux"].to(dtype), "last_hidden_states": data["last"].to(dtype)}
    batch = {"input_ids": data["input_ids"], **features}
    del data["aux"], data["last"]

    def step(mode: str) -> float:
        mask = loss_mask(mode, options)
        optimizer.clear_gradients()
        sums = draft({**batch, "loss_mask": mask}, steps=STEPS, weights=weights)
        loss = sums.numerator / mask.sum()
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
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.models.eagle3.core import Eagle3DraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    sizes, dtype, on_cpu = SHAPES[options.shape], getattr(torch, options.dtype), options.device == "cpu"
    layer = LlamaConfig(
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        intermediate_size=sizes.intermediate,
        vocab_size=sizes.vocab,
        num_hidden_layers=1,
        rms_norm_eps=1e-6,
        max_position_embeddings=4 * sizes.length,
    )
    if on_cpu:
        layer._attn_implementation = "sdpa"
    verifier = VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"])
    proposal = GreedyTokenProposalConfig(speculative_tokens=STEPS)
    model = Eagle3DraftModel(
        Eagle3SpeculatorConfig(
            transformer_layer_config=layer,
            draft_vocab_size=sizes.draft_vocab,
            eagle_aux_hidden_state_layer_ids=[2, 3, 4],
            speculators_config=SpeculatorsConfig(
                algorithm="eagle3",
                proposal_methods=[proposal],
                default_proposal_method="greedy",
                verifier=verifier,
            ),
        )
    )
    data = make_data(options)
    model.to(options.device)
    model.load_vocab_mappings(data["t2d"], data["d2t"])
    with torch.no_grad():
        model.embed_tokens.weight.copy_(data["embedding"])
        model.verifier_lm_head.weight.copy_(data["head"][data["t2d"]])
        model.verifier_norm.weight.fill_(1.0)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not name.startswith(("embed", "verifier")):
                parameter.normal_(std=0.02)
    del data["embedding"], data["head"]
    model.lm_head.weight.requires_grad_(True)
    model.to(dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def one_later(x):
        return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1).flatten(0, 1).unsqueeze(0)

    packed = {
        "hidden_states": data["aux"].flatten(2).flatten(0, 1).unsqueeze(0).to(dtype),
        "input_ids": one_later(data["input_ids"]),
        "verifier_last_hidden_states": one_later(data["last"]).to(dtype),
        "document_ids": torch.arange(sizes.samples).repeat_interleave(sizes.length).unsqueeze(0).to(options.device),
        "position_ids": (1 + torch.arange(sizes.length)).repeat(sizes.samples).unsqueeze(0).to(options.device),
    }
    losses = resolve_loss_config("kl_div", implementation="eager" if on_cpu else "auto")

    def step(mode: str) -> float:
        _, loss, _ = model(
            **packed,
            loss_mask=loss_mask(mode, options).flatten().unsqueeze(0),
            ttt_steps=STEPS,
            ttt_step_loss_decay=DECAY,
            loss_config=losses,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    run(
        StepBenchmark(
            script=__file__,
            title="eagle3",
            modes=MODES,
            tokens_per_step=lambda options: SHAPES[options.shape].samples * SHAPES[options.shape].length,
            sides={"ours": make_ours, "peer": make_peer},
        ),
        parser,
    )
