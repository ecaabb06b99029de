# SPDX-License-Identifier: Apache-2.0
"""Stage 4: from refs to windows of collated micro-batches.

``order`` says which prompt comes when, ``windows`` how a window is cut, ``ref_book`` collects refs, ``prefetch`` reads
ahead in a thread, ``loader`` drives them; ``held_out`` reads evaluation features.
"""
