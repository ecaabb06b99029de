# SPDX-License-Identifier: Apache-2.0
"""Domino for SpecForge (entry point ``domino``)."""
