# SPDX-License-Identifier: Apache-2.0
"""Which positions a micro-batch has to compute at all.

Position t is needed only if one of t .. t+S−1 is trained; keys are needed only up to the last such position. With
30 % of the positions trained nearly everything shrinks to a third. All of this comes from the loss mask, before the
draft runs.

Legend: B samples, T tokens, S unroll steps, Q length of the query rectangle, R needed rows, M trained positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from specforge_core.modeling import QueryLayout, causal_padding_mask
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NeededRows:
    """Index tables of one micro-batch.

    :param layout: where the R rows stand among the keys, for attention.
    :param positions_R: int64, position t of each row.
    :param flat_R: int64, index of each row in the flattened [B, T].
    :param key_length: keys of every sample are its first so many positions.
    :param token_ids_E: int64, tokens whose projections the rows read over all steps.
    :param tokens_SR: int64, which of them row r reads at step k (the token at t + k + 1, 0 past the end).
    :param trained_M: int64, trained positions in the flattened [B, T], in order.
    :param rows_SM: int64, the row that predicts trained position i at step k (row of position t − k; 0 where t < k).
    :param counted_SM: bool, t ≥ k.
    """

    layout: QueryLayout
    positions_R: Tensor
    flat_R: Tensor
    key_length: int
    token_ids_E: Tensor
    tokens_SR: Tensor
    trained_M: Tensor
    rows_SM: Tensor
    counted_SM: Tensor


def _needed(mask_BT: Tensor, steps: int) -> Tensor:
    """bool [B, T]: some position of t .. t+steps−1 is trained."""
    length = mask_BT.shape[1]
    before = torch.nn.functional.pad(mask_BT.long().cumsum(1), (1, 0))
    end = (torch.arange(length, device=mask_BT.device) + steps).clamp(max=length)
    return before[:, end] > before[:, :length]


def _token_tables(input_ids_BT: Tensor, needed_BT: Tensor, flat_R: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """``token_ids_E`` and ``tokens_SR``. A token is listed once per sample and place, whatever steps read it."""
    batch, length = input_ids_BT.shape
    shifted = torch.nn.functional.pad(input_ids_BT[:, 1:], (0, steps))  # x[t + k], zero past the end
    read = torch.zeros(batch, length + steps - 1, dtype=torch.bool, device=input_ids_BT.device)
    for k in range(steps):
        read[:, k : k + length] |= needed_BT
    place = read.flatten().cumsum(0) - 1
    sample, position = flat_R // length, flat_R % length
    first = sample * read.shape[1] + position
    tokens_SR = torch.stack([place[first + k] for k in range(steps)])
    return shifted.flatten()[read.flatten()], tokens_SR


def select_rows(
    input_ids_BT: Tensor, loss_mask_BT: Tensor, *, steps: int, valid_BT: Tensor | None = None
) -> NeededRows | None:
    """The rows this micro-batch needs, or None where nothing is trained.

    :param valid_BT: bool, false at padding. Padding on the right of every trained position needs none: causality
        hides it already.
    """
    batch, length = loss_mask_BT.shape
    needed_BT = _needed(loss_mask_BT, steps)
    somewhere = needed_BT.any(0).nonzero().flatten()
    if somewhere.numel() == 0:
        return None
    offset, key_length = int(somewhere[0]), int(somewhere[-1]) + 1
    rectangle = needed_BT[:, offset:key_length]
    rows = rectangle.flatten().nonzero().flatten()
    flat_R = needed_BT.flatten().nonzero().flatten()
    mask = None
    if valid_BT is not None and bool(((~valid_BT).cumsum(1) > 0)[needed_BT].any()):
        mask = causal_padding_mask(valid_BT[:, :key_length], offset=offset)
    token_ids_E, tokens_SR = _token_tables(input_ids_BT, needed_BT, flat_R, steps)
    row_of = torch.zeros(batch * length, dtype=torch.int64, device=flat_R.device)
    row_of[flat_R] = torch.arange(flat_R.shape[0], device=flat_R.device)
    trained_M = loss_mask_BT.flatten().nonzero().flatten()
    back = torch.arange(steps, device=flat_R.device).unsqueeze(1)
    counted_SM = (trained_M % length) >= back
    rows_SM = row_of[torch.where(counted_SM, trained_M - back, 0)]
    complete = rows.shape[0] == rectangle.numel()
    return NeededRows(
        layout=QueryLayout(batch, offset, key_length - offset, None if complete else rows, mask),
        positions_R=flat_R % length,
        flat_R=flat_R,
        key_length=key_length,
        token_ids_E=token_ids_E,
        tokens_SR=tokens_SR,
        trained_M=trained_M,
        rows_SM=torch.where(counted_SM, rows_SM, 0),
        counted_SM=counted_SM,
    )
