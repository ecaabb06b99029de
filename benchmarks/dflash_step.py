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
from collections.abc import Callable

from alternation import StepBenchmark, run

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=("dflash", "domino"), default="dflash")
    strategy = parser.parse_known_args()[0].strategy
    peer = {"peer": make_peer} if strategy == "dflash" else {}  # the peer has no correction head
    benchmark = StepBenchmark(
        script=__file__,
        title=strategy,
        modes=MODES,
        tokens_per_step=SAMPLES * LENGTH,
        sides={"ours": make_ours, **peer},
    )
    run(benchmark, parser)


if __name__ == "__main__":
    main()
