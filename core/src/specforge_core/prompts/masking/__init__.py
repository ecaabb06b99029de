# SPDX-License-Identifier: Apache-2.0
"""Conversations to token ids and loss masks, with any chat template. Out as ``encoder``."""
