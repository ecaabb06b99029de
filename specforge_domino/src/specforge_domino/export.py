# SPDX-License-Identifier: Apache-2.0
"""Exports in the DFlash layout with ``projector_type: domino``: servers load them as DFlash drafts.

There is no ``speculators`` layout: that format, and vLLM, know no correction head, and would draft without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specforge_core.contracts import ExportError, TargetInfo
from specforge_core.contracts.kinds import FLAG, whole_number
from specforge_core.modeling.export_files import MAX_SIZE, SIZE, read_draft, write_files
from specforge_dflash.export import draft_config, read_fields, read_shape
from specforge_dflash.speculators import SPECULATORS

from specforge_domino.config import HeadShape
from specforge_domino.draft_model import DominoDraft

FORMATS = ("sglang",)
PROJECTOR = "domino"
_HEAD_FIELDS = {
    **dict.fromkeys(("emb_dim", "gru_hidden_dim"), SIZE),
    "pure_draft_prefix_len": whole_number(0, MAX_SIZE),
    "shift_label": FLAG,
}


def write_export(
    draft: DominoDraft, directory: Path, *, format: str, target: TargetInfo, aux_layer_ids: tuple[int, ...]
) -> None:
    """:raises ExportError: an unknown format, or one that cannot describe the correction head."""
    if format == SPECULATORS:
        raise ExportError(
            "the speculators format has no words for Domino's correction head; a server would draft without it",
            hint="export it as sglang",
        )
    if format not in FORMATS:
        raise ExportError(f"domino does not write the format {format!r}", hint=f"known: {', '.join(FORMATS)}")
    head = draft.head_shape
    extra = {
        "projector_type": PROJECTOR,
        "emb_dim": head.emb_dim,
        "gru_hidden_dim": head.gru_hidden_dim,
        "pure_draft_prefix_len": head.pure_draft_prefix_len,
        "shift_label": head.shift_label,
    }
    write_files(directory, draft_config(draft, target, aux_layer_ids, extra=extra), draft.state_dict())


def head_from_config(config: Mapping[str, Any]) -> HeadShape:
    """The correction head's shape from ``dflash_config``; what is left out there has the usual value."""
    own, usual = config["dflash_config"], HeadShape()
    return HeadShape(
        emb_dim=own.get("emb_dim", usual.emb_dim),
        gru_hidden_dim=own.get("gru_hidden_dim", usual.gru_hidden_dim),
        pure_draft_prefix_len=own.get("pure_draft_prefix_len", usual.pure_draft_prefix_len),
        shift_label=own.get("shift_label", usual.shift_label),
    )


def read_export(directory: Path, target: TargetInfo) -> DominoDraft:
    """The draft of an export; its frozen parts are still to be loaded.

    :raises ExportError: files or weights missing, damaged, of another shape, or of another target's vocabulary.
    """
    fields = read_fields(directory, more=_HEAD_FIELDS)
    if fields["dflash_config"].get("projector_type") != PROJECTOR:
        raise ExportError(
            "this draft has no correction head; it is not a Domino draft",
            where=str(directory),
            hint="name a Domino export",
        )
    shape, head = read_shape(fields, directory, target), head_from_config(fields)
    return read_draft(lambda: DominoDraft(shape, head), directory)
