# SPDX-License-Identifier: Apache-2.0
"""The target's tokenizer as a value that worker processes can be given. Not in ``assemble``, which imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from specforge_core.contracts import ChatTokenizer
from specforge_core.hooks.descriptors import resolve
from specforge_core.hooks.sections import PluginSection
from specforge_core.prompts.encoder_processes import TokenizerFactory


@dataclass(frozen=True, slots=True)
class PluginTokenizer(TokenizerFactory):
    """Makes the tokenizer of the target that a run's plugin describes.

    :param function: the plugin's ``"module:function"``, called with the target's section.
    """

    function: str
    section: PluginSection

    def __call__(self) -> ChatTokenizer:
        tokenizer: ChatTokenizer = resolve(self.function)(self.section)
        return tokenizer
