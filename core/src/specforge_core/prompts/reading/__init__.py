# SPDX-License-Identifier: Apache-2.0
"""Files as people have them to rows that are understood: conversations, texts, tokens. Out as ``rows``."""
