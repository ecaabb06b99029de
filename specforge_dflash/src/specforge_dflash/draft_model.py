# SPDX-License-Identifier: Apache-2.0
"""The DFlash draft: parameters under the names servers load, and its layers' arithmetic.

Layers run over packed blocks in training (:meth:`DflashDraft.trained_states`) and over one block in decoding
(``drafter``). Every layer reads keys and values from two places: the blocks' own slots, and one context made of the
target's captured features, the same for all layers.

Legend: B samples, T tokens, M blocks, K block size, R = M·K slots, C context positions, E trained slots, L captured
layers, H draft hidden, A target hidden, N query heads, G key heads, D head size, F intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from specforge_core.contracts import AUX_HIDDEN_STATES
from specforge_core.modeling import (
    FrozenEmbedding,
    FrozenHead,
    RMSNorm,
    RotaryEmbedding,
    gated_mlp,
    rms_norm_linear,
    rotate,
)
from torch import Tensor, nn

from specforge_dflash.block_attention import BlockKeys, attend_blocks
from specforge_dflash.config import DraftShape
from specforge_dflash.loss import SlotScores, score_slots
from specforge_dflash.rows import PackedBlocks, pack_blocks

_INITIAL_STD = 0.02  # as GPT-2 and the models that are drafted for

Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class FoldedLayer:
    """A layer's matrices, joined where one product does the work of several: q, k, v and gate, up.

    :param projections: [(N + 2G)·D, H].
    :param gate_up: [2F, H].
    """

    projections: Tensor
    gate_up: Tensor


class _Attention(nn.Module):
    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, eps=shape.rms_norm_eps)
        self.k_norm = RMSNorm(shape.head_dim, eps=shape.rms_norm_eps)


class _GatedMlp(nn.Module):
    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)


class DecoderLayer(nn.Module):
    """A Qwen3 layer whose keys and values also come from a context that passes no norm of this layer."""

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self._heads = shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads
        self._head_dim = shape.head_dim
        self.input_layernorm = RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = _GatedMlp(shape)

    def fold(self) -> FoldedLayer:
        """Join the layer's matrices; once per forward pass, gradients flow back to each."""
        attention, mlp = self.self_attn, self.mlp
        return FoldedLayer(
            torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        )

    def project_slots(self, state_RH: Tensor, folded: FoldedLayer, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """q [R, N, D] and k [R, G, D], normed and rotated, and v [R, G, D]."""
        projected = rms_norm_linear(state_RH, self.input_layernorm, folded.projections)
        query, key, value = projected.unflatten(1, (-1, self._head_dim)).split(self._heads, dim=1)
        query, key = self.self_attn.q_norm(query), self.self_attn.k_norm(key)
        # The copy lets go of the projection, which a view would keep alive until backward.
        return rotate(query, *angles), rotate(key, *angles), value.contiguous()

    def project_context(self, context_CH: Tensor, folded: FoldedLayer, angles: Angles) -> tuple[Tensor, Tensor]:
        """k [C, G, D], normed and rotated, and v [C, G, D]."""
        keys_only = folded.projections[self._heads[0] * self._head_dim :]
        key, value = (context_CH @ keys_only.T).unflatten(1, (-1, self._head_dim)).chunk(2, dim=1)
        return rotate(self.self_attn.k_norm(key), *angles), value.contiguous()

    def finish(self, state_RH: Tensor, attended_RND: Tensor, folded: FoldedLayer) -> Tensor:
        """Both residual branches of the layer, from the heads' outputs."""
        state_RH = state_RH + self.self_attn.o_proj(attended_RND.flatten(1))
        mlp = gated_mlp(
            state_RH,
            self.post_attention_layernorm,
            gate_up_FH=folded.gate_up,
            down_HF=self.mlp.down_proj.weight,
        )
        return state_RH + mlp


class DflashDraft(nn.Module):
    """A DFlash draft (arXiv 2602.06036).

    ``state_dict`` is the checkpoint: the trained parameters. The target's embedding and head are frozen,
    non-persistent, and NaN until loaded.
    """

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = FrozenEmbedding(shape.vocab_size, shape.hidden_size)
        self.target_head = FrozenHead(shape.vocab_size, shape.hidden_size, norm_eps=None)
        self.fc = nn.Linear(shape.num_aux * shape.target_hidden_size, shape.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in shape.layer_types)
        self.norm = RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.rotary = RotaryEmbedding(shape.rope_parameters, head_dim=shape.head_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_INITIAL_STD)

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    def decoder_layers(self) -> list[tuple[DecoderLayer, int | None]]:
        """The layers, each with its attention window."""
        layers = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
        return [(layer, self.shape.window(i)) for i, layer in enumerate(layers)]

    def join_features(self, aux_CLA: Tensor) -> Tensor:
        """The context that every layer reads, ``RMS(fc(aux); hidden_norm)``: [C, L, A] → [C, H]."""
        context: Tensor = self.hidden_norm(self.fc(aux_CLA.to(self.dtype).flatten(1)))
        return context

    def embed_blocks(self, anchor_tokens_M: Tensor) -> Tensor:
        """Slot 0 holds the anchor's token, the others the mask token: int64 [M] → [M·K, H]."""
        tokens_MK = anchor_tokens_M.new_full(
            (anchor_tokens_M.shape[0], self.shape.block_size), self.shape.mask_token_id
        )
        tokens_MK[:, 0] = anchor_tokens_M
        embedded: Tensor = self.embed_tokens(tokens_MK.flatten())
        return embedded

    def trained_states(self, aux_BTLA: Tensor, blocks: PackedBlocks) -> Tensor:
        """What the head reads at every trained slot: [E, H]."""
        layout, layers = blocks.layout, self.decoder_layers()
        context = self.join_features(aux_BTLA.flatten(0, 1)[blocks.context_C])
        state = self.embed_blocks(blocks.anchor_tokens_M)
        own_angles = self.rotary.at(layout.slot_positions, blocks.longest)
        context_angles = self.rotary.at(layout.position_C, blocks.longest)
        for number, (layer, window) in enumerate(layers):
            folded = layer.fold()
            query, own_key, own_value = layer.project_slots(state, folded, own_angles)
            keys = BlockKeys(own_key, own_value, *layer.project_context(context, folded, context_angles))
            attended = attend_blocks(layout, query, keys, window=window)
            if number == len(layers) - 1:  # nothing reads the other slots any more
                state, attended = state[blocks.trained_E], attended[blocks.trained_E]
            state = layer.finish(state, attended, folded)
        normed: Tensor = self.norm(state)
        return normed

    def untouched(self) -> Tensor:
        """A zero that is connected to every trained parameter: backward gives zero gradients, not none."""
        zero = torch.zeros((), device=self.fc.weight.device)
        return sum((p.flatten()[0].float() * 0 for p in self.parameters() if p.requires_grad), zero)

    def forward(self, tensors: Mapping[str, Tensor]) -> SlotScores | None:
        """Cross-entropy and correctness of every trained slot of a collated batch; None where there is none.

        One call covers every use of a parameter, so that what wraps ``forward`` (sharding) sees them all.
        """
        blocks = pack_blocks(tensors, block_size=self.shape.block_size, offset=0)
        if blocks is None:
            return None
        states_EH = self.trained_states(tensors[AUX_HIDDEN_STATES], blocks)
        return score_slots(blocks, states_EH, self.target_head)
