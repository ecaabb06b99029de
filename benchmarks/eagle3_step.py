# SPDX-License-Identifier: Apache-2.0
"""One EAGLE3 training step against ``speculators`` 0.9.0, alternating in one run.

    python benchmarks/eagle3_step.py --peer-python PEER_VENV/bin/python [--dtype bfloat16]

The peer lives in its own environment (see benchmarks/README.md). Each side is a process that waits on its standard
input while the other works. Both get the same weights' shapes, features, mask, unroll steps, trainable parameters
(draft head included; embedding and target head frozen) and optimizer (AdamW), one packed or batched micro-batch of
1,024 tokens per step. The target's likeliest token is always in the draft vocabulary, so "all trained" means all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from alternation import StepBenchmark, run

HIDDEN, HEADS, INTERMEDIATE, VOCAB, DRAFT_VOCAB = 512, 8, 1536, 32_000, 8_000
SAMPLES, LENGTH, STEPS, DECAY = 2, 512, 7, 0.8
MODES = ("all", "30%")


def trained_span(mode: str) -> tuple[int, int]:
    """First and last (exclusive) trained position of a sample: one contiguous response at its end."""
    return (0, LENGTH) if mode == "all" else (LENGTH - int(0.3 * LENGTH), LENGTH)


def make_data() -> dict:
    """The same features for both sides; fp32."""
    import torch

    torch.manual_seed(0)
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[torch.randperm(VOCAB)[:DRAFT_VOCAB]] = True
    head = torch.randn(VOCAB, HIDDEN) * 0.1
    head[~t2d] *= 0.2
    return {
        "t2d": t2d,
        "d2t": t2d.nonzero().flatten() - torch.arange(DRAFT_VOCAB),
        "head": head,
        "embedding": torch.randn(VOCAB, HIDDEN) * 0.05,
        "input_ids": torch.randint(0, VOCAB, (SAMPLES, LENGTH)),
        "aux": torch.randn(SAMPLES, LENGTH, 3, HIDDEN),
        "last": torch.randn(SAMPLES, LENGTH, HIDDEN),
    }


def loss_mask(mode: str):
    import torch

    mask = torch.zeros(SAMPLES, LENGTH, dtype=torch.bool)
    start, end = trained_span(mode)
    mask[:, start:end] = True
    return mask


def make_ours(dtype: str) -> Callable[[str], float]:
    """A function that does one step in a mode and returns the loss."""
    import torch
    from specforge_core.modeling import VocabMap
    from specforge_eagle3.config import DraftShape
    from specforge_eagle3.draft_model import Eagle3Draft
    from specforge_eagle3.loss import StepWeights

    data = make_data()
    shape = DraftShape(
        vocab_size=VOCAB,
        draft_vocab_size=DRAFT_VOCAB,
        hidden_size=HIDDEN,
        target_hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_theta": 10000.0},
        last_hidden_norm="pre",
    )
    draft = Eagle3Draft(shape, VocabMap(data["t2d"], data["d2t"]))
    draft.embed_tokens.load(data["embedding"])
    draft.target_head.load(data["head"], torch.ones(HIDDEN))
    del data["embedding"], data["head"]
    masters = [parameter.detach().clone() for parameter in draft.parameters()] if dtype == "bfloat16" else []
    draft.to(getattr(torch, dtype))
    trained = list(draft.parameters())
    optimizer = torch.optim.AdamW(masters or trained, lr=1e-4, weight_decay=0.0)
    nothing = (0.0,) * STEPS
    weights = StepWeights(tuple(DECAY**k for k in range(STEPS)), nothing, nothing)
    batch = {"input_ids": data["input_ids"], "aux_hidden_states": data["aux"], "last_hidden_states": data["last"]}

    def step(mode: str) -> float:
        mask = loss_mask(mode)
        sums = draft({**batch, "loss_mask": mask}, steps=STEPS, weights=weights)
        loss = sums.numerator / mask.sum()
        loss.backward()
        for master, parameter in zip(masters, trained, strict=False):
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        for master, parameter in zip(masters, trained, strict=False):
            parameter.data.copy_(master)
        optimizer.zero_grad()
        return loss.item()

    return step


def make_peer(dtype: str) -> Callable[[str], float]:
    """The same step by speculators: sdpa attention and eager losses, which is what works on CPU."""
    import torch
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.models.eagle3.core import Eagle3DraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    layer = LlamaConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=INTERMEDIATE,
        vocab_size=VOCAB,
        num_hidden_layers=1,
        rms_norm_eps=1e-6,
        max_position_embeddings=4 * LENGTH,
    )
    layer._attn_implementation = "sdpa"
    verifier = VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"])
    proposal = GreedyTokenProposalConfig(speculative_tokens=STEPS)
    model = Eagle3DraftModel(
        Eagle3SpeculatorConfig(
            transformer_layer_config=layer,
            draft_vocab_size=DRAFT_VOCAB,
            eagle_aux_hidden_state_layer_ids=[2, 3, 4],
            speculators_config=SpeculatorsConfig(
                algorithm="eagle3",
                proposal_methods=[proposal],
                default_proposal_method="greedy",
                verifier=verifier,
            ),
        )
    )
    data = make_data()
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
    model.to(getattr(torch, dtype))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)

    def one_later(x):
        return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1).flatten(0, 1).unsqueeze(0)

    packed = {
        "hidden_states": data["aux"].flatten(2).flatten(0, 1).unsqueeze(0).to(getattr(torch, dtype)),
        "input_ids": one_later(data["input_ids"]),
        "verifier_last_hidden_states": one_later(data["last"]).to(getattr(torch, dtype)),
        "document_ids": torch.arange(SAMPLES).repeat_interleave(LENGTH).unsqueeze(0),
        "position_ids": (1 + torch.arange(LENGTH)).repeat(SAMPLES).unsqueeze(0),
    }
    losses = resolve_loss_config("kl_div", implementation="eager")

    def step(mode: str) -> float:
        _, loss, _ = model(
            **packed,
            loss_mask=loss_mask(mode).flatten().unsqueeze(0),
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
    run(
        StepBenchmark(
            script=__file__,
            title="eagle3",
            modes=MODES,
            tokens_per_step=SAMPLES * LENGTH,
            sides={
                "ours": lambda options: make_ours(options.dtype),
                "peer": lambda options: make_peer(options.dtype),
            },
        ),
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter),
    )
