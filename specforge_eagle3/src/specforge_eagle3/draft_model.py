# SPDX-License-Identifier: Apache-2.0
"""The EAGLE3 draft: parameters under the names servers load, and one decoder layer's arithmetic.

The layer is used twice: ``unroll`` runs it over packed rows in training, ``drafter`` over one sequence in decoding.
Both fold the input projections once (:meth:`Eagle3Draft.fold`): q, k and v act on ``[RMS(e), RMS(g)]``, so the half
that acts on the embedding e depends on the token alone and is computed once per token instead of at every step.

Legend: R packed rows, L captured layers, H draft hidden, A target hidden, N query heads, G key heads, D head size,
P = (N + 2G)·D projected sizes, F intermediate size, V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from specforge_core.modeling import (
    FrozenEmbedding,
    FrozenHead,
    RMSNorm,
    RotaryEmbedding,
    VocabMap,
    gated_mlp,
    rms_norm_linear,
    rotate,
)
from torch import Tensor, nn

from specforge_eagle3.config import DraftShape
from specforge_eagle3.loss import StepWeights, UnrollSums
from specforge_eagle3.unroll import unrolled_sums

_INITIAL_STD = 0.02  # as GPT-2 and the models that are drafted for


class _Attention(nn.Module):
    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        inputs, head_dim = 2 * shape.hidden_size, shape.head_dim
        self.q_proj = nn.Linear(inputs, shape.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(inputs, shape.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(inputs, shape.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(shape.num_attention_heads * head_dim, shape.hidden_size, bias=False)


class _GatedMlp(nn.Module):
    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)


class _DecoderLayer(nn.Module):
    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.hidden_norm = RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = _GatedMlp(shape)


@dataclass(frozen=True, slots=True)
class FoldedWeights:
    """The layer's matrices, joined where one product can do the work of several.

    :param embedding: [P, H], the half of q, k, v that acts on the embedding.
    :param hidden: [P, H], the half that acts on the hidden state.
    :param gate_up: [2F, H].
    """

    embedding: Tensor
    hidden: Tensor
    gate_up: Tensor

    def without_queries(self, query_width: int) -> FoldedWeights:
        """The same with the q rows left out, for positions that are keys only."""
        return FoldedWeights(self.embedding[query_width:], self.hidden[query_width:], self.gate_up)


class Eagle3Draft(nn.Module):
    """An EAGLE3 draft (arXiv 2503.01840, with EAGLE-3.1's ``fc_norm``).

    ``state_dict`` is the checkpoint: the trained parameters, ``t2d`` and ``d2t``. The target's embedding and head are
    frozen, non-persistent, and NaN until loaded.
    """

    t2d: Tensor
    d2t: Tensor

    def __init__(self, shape: DraftShape, vocabulary: VocabMap) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = FrozenEmbedding(shape.vocab_size, shape.hidden_size)
        self.target_head = FrozenHead(
            shape.vocab_size,
            shape.target_hidden_size,
            norm_eps=shape.rms_norm_eps if shape.last_hidden_norm == "pre" else None,
        )
        if shape.fc_norm:
            self.fc_norm = nn.ModuleList(
                RMSNorm(shape.target_hidden_size, eps=shape.rms_norm_eps) for _ in range(shape.num_aux)
            )
        self.fc = nn.Linear(shape.num_aux * shape.target_hidden_size, shape.hidden_size, bias=False)
        self.midlayer = _DecoderLayer(shape)
        self.norm = RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.norm.requires_grad_(shape.norm_output)
        self.lm_head = nn.Linear(shape.hidden_size, shape.draft_vocab_size, bias=False)
        self.register_buffer("t2d", vocabulary.t2d.clone())
        self.register_buffer("d2t", vocabulary.d2t.clone())
        self.rotary = RotaryEmbedding(shape.rope_parameters, head_dim=shape.head_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_INITIAL_STD)

    @property
    def vocabulary(self) -> VocabMap:
        return VocabMap(self.t2d, self.d2t)

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    def fold(self) -> FoldedWeights:
        """Join the layer's matrices; once per forward pass, gradients flow back to each."""
        attention, mlp = self.midlayer.self_attn, self.midlayer.mlp
        projections = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        embedding, hidden = projections.split(self.shape.hidden_size, dim=1)
        return FoldedWeights(embedding, hidden, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))

    def join_features(self, aux_RLA: Tensor) -> Tensor:
        """``g_0 = fc(concat_i fc_norm_i?(aux_i))``: [R, L, A] → [R, H]."""
        aux_RLA = aux_RLA.to(self.dtype)
        if self.shape.fc_norm:
            aux_RLA = torch.stack([norm(aux_RLA[:, i]) for i, norm in enumerate(self.fc_norm)], dim=1)
        joined: Tensor = self.fc(aux_RLA.flatten(1))
        return joined

    def project_tokens(self, token_ids_R: Tensor, folded: FoldedWeights) -> Tensor:
        """The tokens' share of q, k and v: int64 [R] → [R, P]."""
        return rms_norm_linear(self.embed_tokens(token_ids_R), self.midlayer.input_layernorm, folded.embedding)

    def project_hidden(self, state_RH: Tensor, folded: FoldedWeights) -> Tensor:
        """The hidden state's share of q, k and v: [R, H] → [R, P]."""
        return rms_norm_linear(state_RH, self.midlayer.hidden_norm, folded.hidden)

    def split_heads(self, projected_RP: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q [R, N, D] and k [R, G, D], rotated, and v [R, G, D]."""
        shape = self.shape
        heads = projected_RP.view(projected_RP.shape[0], -1, shape.head_dim)
        query_key, value = heads.split(
            [shape.num_attention_heads + shape.num_key_value_heads, shape.num_key_value_heads], dim=1
        )
        query, key = rotate(query_key, *angles).split([shape.num_attention_heads, shape.num_key_value_heads], dim=1)
        # The copy lets go of the projection, which a view would keep alive until backward.
        return query, key, value.contiguous()

    def split_keys(self, projected: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """k [R, G, D], rotated, and v [R, G, D], of a projection that left the queries out."""
        key, value = projected.view(projected.shape[0], -1, self.shape.head_dim).chunk(2, dim=1)
        return rotate(key, *angles), value

    def finish_layer(self, state_RH: Tensor, attended_RND: Tensor, folded: FoldedWeights) -> Tensor:
        """``g_{k+1}`` from ``g_k`` and the heads' outputs: both residual branches of the layer."""
        layer = self.midlayer
        state_RH = state_RH + layer.self_attn.o_proj(attended_RND.flatten(1))
        norm = layer.post_attention_layernorm
        return state_RH + gated_mlp(state_RH, norm, gate_up_FH=folded.gate_up, down_HF=layer.mlp.down_proj.weight)

    def before_head(self, state_RH: Tensor) -> Tensor:
        """What the head reads: the state, normed unless ``norm_output`` is off."""
        normed: Tensor = self.norm(state_RH) if self.shape.norm_output else state_RH
        return normed

    def forward(self, tensors: Mapping[str, Tensor], *, steps: int, weights: StepWeights) -> UnrollSums:
        """The unrolled loss sums of one micro-batch; see :func:`specforge_eagle3.unroll.unrolled_sums`.

        One call covers every use of a parameter, so that what wraps ``forward`` (sharding) sees them all.
        """
        return unrolled_sums(self, tensors, steps=steps, weights=weights)
