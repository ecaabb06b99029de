# SPDX-License-Identifier: Apache-2.0
"""The strategy contract, for the two that fill whole blocks, in every loss and attention they offer."""

from __future__ import annotations

from typing import ClassVar

from specforge_core.testing.strategy_suite import StrategySuite

_SMALL = {"block_size": 5, "num_anchors": 4, "num_layers": 2}


class TestDflash(StrategySuite):
    plugin = "specforge_dflash.plugin"
    name = "dflash"
    settings: ClassVar = {**_SMALL, "loss_decay_gamma": 7.0}


class TestDflashSlidingDpace(TestDflash):
    settings: ClassVar = {**_SMALL, "sliding_window": 4, "loss_type": "dpace"}


class TestDflashMixedLayers(TestDflash):
    settings: ClassVar = {
        **_SMALL,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 3,
        "loss_type": "dpace-continuation-value-only",
        "num_key_value_heads": 4,
    }


class TestDflashOneLayer(TestDflash):
    settings: ClassVar = {"num_layers": 1, "loss_type": "dpace-cumulative-confidence-only", "mask_token_id": 3}


class TestDomino(StrategySuite):
    plugin = "specforge_domino.plugin"
    name = "domino"
    settings: ClassVar = {**_SMALL, "emb_dim": 8, "gru_hidden_dim": 12, "loss_decay_gamma": 7.0}


class TestDominoUnshifted(TestDomino):
    settings: ClassVar = {
        **_SMALL,
        "emb_dim": 8,
        "gru_hidden_dim": 12,
        "shift_label": False,
        "pure_draft_prefix_len": 0,
        "sliding_window": 6,
    }
