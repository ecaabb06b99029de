# SPDX-License-Identifier: Apache-2.0
"""DFlash for SpecForge (entry point ``dflash``)."""
