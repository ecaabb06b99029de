# SPDX-License-Identifier: Apache-2.0
"""Stage 7: real greedy decoding, plain and speculative, and the bench that compares them."""
