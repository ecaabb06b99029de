# SPDX-License-Identifier: Apache-2.0
"""The queue of capture work: what is wanted, who has it, what came of it. It is to take the ref channel's place; no run
uses it yet."""
