# SPDX-License-Identifier: Apache-2.0
"""Stage 2: the queue of capture work: what is wanted, who has it, what came of it."""
