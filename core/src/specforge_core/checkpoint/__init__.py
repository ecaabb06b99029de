# SPDX-License-Identifier: Apache-2.0
"""Stage 6: checkpoints, from which a run resumes with the same bits.

``layout`` says what lies where, ``tensor_files`` reads and writes tensors, ``manifest`` proves that files are whole,
``provenance`` compares runs, ``writer`` writes (complete or invisible), ``resume`` reads.
"""
