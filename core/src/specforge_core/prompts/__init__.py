# SPDX-License-Identifier: Apache-2.0
"""Stage 1: conversations become token ids and loss masks. In through ``prepare``, out as ``prompt_set``."""
