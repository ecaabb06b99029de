# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 drafts for SpecForge."""
