# SPDX-License-Identifier: Apache-2.0
"""Target engine on Hugging Face transformers."""
