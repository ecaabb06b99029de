# SPDX-License-Identifier: Apache-2.0
"""Stage 8: files that servers load, verified by reading them back."""
