# SPDX-License-Identifier: Apache-2.0
"""The tiny tokenizer, armed: a text says what becomes of the process that encodes it. Imports no torch, for workers."""

from __future__ import annotations

import logging
import os
import signal
import time
from dataclasses import dataclass

from specforge_core.contracts import EncodedText, TargetError
from specforge_core.prompts.encoder_processes import TokenizerFactory
from specforge_core.testing.tiny_tokenizer import TinyTokenizer

VOCABULARY = 260
"""Bytes, and the tiny tokenizer's special tokens."""


class ArmedTokenizer(TinyTokenizer):
    """Dies, is stopped, fails or takes its time where the text says so."""

    def encode(self, text: str) -> EncodedText:
        if "KILL-ME" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if "STOP-ME" in text:
            os.kill(os.getpid(), signal.SIGSTOP)
        if "FAIL-ME" in text:
            raise TargetError("the tokenizer gave up", where="armed", hint="disarm it")
        if "TAKE-YOUR-TIME" in text:
            time.sleep(0.02)
        return super().encode(text)


@dataclass(frozen=True)
class Armed(TokenizerFactory):
    """Makes an armed tokenizer in any process.

    :param failing: instead it finds no tokenizer.
    :param wary: it warns.
    """

    failing: bool = False
    wary: bool = False

    def __call__(self) -> ArmedTokenizer:
        if self.failing:
            raise TargetError("there is no tokenizer", where="armed")
        if self.wary:
            logging.getLogger("specforge_core.prompts.armed").warning("this tokenizer is armed")
        return ArmedTokenizer()
