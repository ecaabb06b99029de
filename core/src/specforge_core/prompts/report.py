# SPDX-License-Identifier: Apache-2.0
"""What preparing prompts counted, by source: nothing is left out in silence."""

from __future__ import annotations

from collections.abc import Mapping

COUNTS: Mapping[str, str] = {
    "answers_trained": "assistant turns that are trained",
    "answers_untrained": "assistant turns that the row says not to train",
    "answers_cut": "assistant turns that their server stopped early (finish_reason length): among the untrained",
    "answers_left_out": "assistant turns not trained: they cannot be told from the rest of the text",
    "ends_trained": "trained runs that end in a stop token",
    "ends_missing": "trained runs without a stop token at their end: the draft does not learn to stop there",
    "cut": "samples cut at data.max_length",
    "thoughts_rendered": "thoughts that the template renders",
    "thoughts_lost": "thoughts that the template leaves out",
    "empty_thoughts": "empty thinking blocks that the template inserted, which are not trained",
    "tools_rendered": "rows whose tools the template renders",
    "tools_lost": "rows whose tools the template leaves out",
    "tool_calls": "tool calls that are trained",
    "texts_lost": "texts of system, user or tool that the template leaves out",
    "reencoded_alike": "rows with token ids of their own that encoding their conversation gives too",
    "reencoded_otherwise": "rows with token ids of their own that encoding their conversation does not give",
}
"""What may be counted of a sample, and what that means."""
