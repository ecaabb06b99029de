# SPDX-License-Identifier: Apache-2.0
"""After a run: its numbers as pictures and one page. Reads the run directory only."""
