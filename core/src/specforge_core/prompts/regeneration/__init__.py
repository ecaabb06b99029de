# SPDX-License-Identifier: Apache-2.0
"""Answers made by the target: conversations in, the same conversations with the target's own answers out."""
