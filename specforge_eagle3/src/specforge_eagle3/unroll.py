# SPDX-License-Identifier: Apache-2.0
"""The unrolled forward pass: every row drafts S tokens in a row, as it will in decoding.

At step k the row of position t stands for a guess of token t + k + 2 made from its own earlier states. Keys of the
first pass are shared by all rows of a sample; keys of later steps are seen by their own row only
(EAGLE-3, arXiv 2503.01840 §3).

Legend: B samples, T tokens, L captured layers, A target hidden, H draft hidden, R needed rows, S unroll steps,
G key heads, D head size, J key positions (the first ``key_length`` of every sample).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from specforge_core.contracts import AUX_HIDDEN_STATES, INPUT_IDS, LAST_HIDDEN_STATES, LOSS_MASK
from specforge_core.modeling import attend
from torch import Tensor

from specforge_eagle3.loss import Labels, RowIndex, StepWeights, UnrollSums, distil
from specforge_eagle3.rows import NeededRows, select_rows

if TYPE_CHECKING:
    from specforge_eagle3.draft_model import Eagle3Draft, FoldedWeights

ATTENTION_MASK = "attention_mask"


def labels_at(draft: Eagle3Draft, last_BTA: Tensor, trained_M: Tensor) -> Labels:
    """What gives the target's logits one position later: the next position's last hidden state, zero past the end."""
    length = last_BTA.shape[1]
    ends = (trained_M % length) == length - 1
    following = last_BTA.flatten(0, 1)[torch.where(ends, trained_M, trained_M + 1)]
    return Labels(draft.target_head, draft.vocabulary, following.masked_fill_(ends.unsqueeze(1), 0))


def unrolled_sums(draft: Eagle3Draft, tensors: Mapping[str, Tensor], *, steps: int, weights: StepWeights) -> UnrollSums:
    """Unroll, head and loss of one micro-batch.

    :param tensors: ``input_ids`` [B, T], ``loss_mask`` bool [B, T], ``aux_hidden_states`` [B, T, L, A],
        ``last_hidden_states`` [B, T, A]; and ``attention_mask`` [B, T] where padding is not all on the right.
    :param weights: coefficients, per step, of the sums in the numerator.
    """
    valid = tensors.get(ATTENTION_MASK)
    rows = select_rows(
        tensors[INPUT_IDS], tensors[LOSS_MASK], steps=steps, valid_BT=None if valid is None else valid.bool()
    )
    if rows is None:
        return _nothing_trained(draft, steps)
    hidden_SRH = unroll(draft, tensors[INPUT_IDS], tensors[AUX_HIDDEN_STATES], rows=rows, steps=steps)
    labels = labels_at(draft, tensors[LAST_HIDDEN_STATES], rows.trained_M)
    index = RowIndex(rows.rows_SM, rows.counted_SM)
    return distil(hidden_SRH, draft.lm_head.weight, labels=labels, index=index, weights=weights)


def _nothing_trained(draft: Eagle3Draft, steps: int) -> UnrollSums:
    """Zeros, still connected to every trained parameter, so that backward gives zero gradients, not none."""
    zeros = torch.zeros(steps, device=draft.d2t.device)
    touched = sum((p.flatten()[0].float() * 0 for p in draft.parameters() if p.requires_grad), zeros[0])
    return UnrollSums(touched, zeros, zeros, zeros, zeros, zeros, zeros)


def _first_keys(
    draft: Eagle3Draft, state_KH: Tensor, tokens_K: Tensor, folded: FoldedWeights, angles: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Keys and values of the first pass for all key positions, where only some of them are rows."""
    keys_only = folded.without_queries(draft.shape.num_attention_heads * draft.shape.head_dim)
    projected = draft.project_tokens(tokens_K, keys_only) + draft.project_hidden(state_KH, keys_only)
    return draft.split_keys(projected, angles)


def unroll(draft: Eagle3Draft, input_ids_BT: Tensor, aux_BTLA: Tensor, *, rows: NeededRows, steps: int) -> Tensor:
    """Run the draft's layer ``steps`` times over the needed rows.

    :returns: what the head reads at each step, [S, R, H].
    """
    batch, length = input_ids_BT.shape
    layout, shape = rows.layout, draft.shape
    folded = draft.fold()
    tokens_EP = draft.project_tokens(rows.token_ids_E, folded)
    every_key_is_a_row = layout.offset == 0 and layout.rows is None
    longest = length + steps

    if every_key_is_a_row:
        state = draft.join_features(aux_BTLA.flatten(0, 1)[rows.flat_R])
        keys = values = None
    else:
        within = torch.arange(rows.key_length, device=input_ids_BT.device)
        flat_K = (torch.arange(batch, device=within.device).unsqueeze(1) * length + within).flatten()
        all_states = draft.join_features(aux_BTLA.flatten(0, 1)[flat_K])
        shifted = torch.nn.functional.pad(input_ids_BT[:, 1:], (0, 1)).flatten()
        keys, values = _first_keys(
            draft, all_states, shifted[flat_K], folded, draft.rotary.at(within.repeat(batch), longest)
        )
        sample = rows.flat_R // length
        state = all_states[sample * rows.key_length + rows.positions_R]

    outputs: list[Tensor] = []
    own: list[tuple[Tensor, Tensor]] = []
    key_BGJD = value_BGJD = torch.empty(0)
    for k in range(steps):
        projected = tokens_EP.index_select(0, rows.tokens_SR[k]) + draft.project_hidden(state, folded)
        query, key, value = draft.split_heads(projected, draft.rotary.at(rows.positions_R + k, longest))
        if k == 0:
            first = (key, value) if keys is None or values is None else (keys, values)
            key_BGJD, value_BGJD = (
                x.view(batch, rows.key_length, shape.num_key_value_heads, shape.head_dim).transpose(1, 2) for x in first
            )
        else:
            own.append((key, value))
        state = draft.finish_layer(state, attend(layout, query, key_BGJD, value_BGJD, own=own), folded)
        outputs.append(draft.before_head(state))
    return torch.stack(outputs)
