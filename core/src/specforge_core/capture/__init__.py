# SPDX-License-Identifier: Apache-2.0
"""Stage 2: prompts in, features and refs out. ``loop`` is the stage; ``quiet`` and ``verification`` serve it."""
