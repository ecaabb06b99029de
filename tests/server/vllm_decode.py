# SPDX-License-Identifier: Apache-2.0
"""Run by an environment that has vLLM, not by pytest: decodes prompts greedily on CPU and says what every pass gave.

Usage: ``python vllm_decode.py JOB.json RESULT.json``. The job names ``model`` (a target, or an export that names its
own target), ``speculative`` (vLLM's setting, or null), ``prompts`` (token ids), ``max_tokens`` and ``stop`` (ids).
One request runs at a time, one engine step after another, so that what a pass accepted can be told from its counters.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: nothing outlives it
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos"
DRAFTS = "vllm:spec_decode_num_drafts"


def read_counters(llm: Any) -> tuple[int, list[int]]:
    """Proposals so far, and how often each of their positions was accepted."""
    drafts, accepted = 0, []
    for metric in llm.get_metrics():
        if metric.name == DRAFTS:
            drafts = int(metric.value)
        elif metric.name == ACCEPTED:
            accepted = [int(value) for value in metric.values]
    return drafts, accepted


def decode(llm: Any, name: str, prompt: list[int], params: Any) -> dict[str, Any]:
    """One prompt: its output, and for every pass [tokens it emitted, draft tokens it accepted or null]."""
    engine, token_ids, passes = llm.llm_engine, [], []
    engine.add_request(name, {"prompt_token_ids": prompt}, params)
    drafts, accepted = read_counters(llm)
    while engine.has_unfinished_requests():
        for output in engine.step():
            now = list(output.outputs[0].token_ids)
            drafts_now, accepted_now = read_counters(llm)
            gained = sum(accepted_now) - sum(accepted) if drafts_now > drafts else None
            passes.append([len(now) - len(token_ids), gained])
            token_ids, drafts, accepted = now, drafts_now, accepted_now
    return {"token_ids": token_ids, "passes": passes}


def mend_context_norm() -> None:
    """Norm each draft layer's context keys with that layer's own weight.

    vLLM 0.32 hands all layers' weights, [layers, head size], to one kernel call. The kernel for CPU reads the first
    row only, so a DFlash draft of several layers reads its context through the first layer's key norm there (outputs
    differ by 1e-2, and agree to 4e-7 once mended). Only CPU is concerned; it is a crutch of this test, not of drafts.
    """
    import torch
    from vllm import _custom_ops as ops
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

    def normalize(self: Any, keys: Any) -> Any:
        normed = torch.empty_like(keys)
        for layer, weight in enumerate(self._k_norm_weights):
            ops.rms_norm(normed[layer], keys[layer], weight, self._rms_norm_eps)
        return normed

    DFlashQwen3Model._normalize_context_k = normalize


def main() -> None:
    from vllm import LLM, SamplingParams

    mend_context_norm()
    job = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(
        model=job["model"],
        speculative_config=job["speculative"],
        dtype="float32",
        max_model_len=512,
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        async_scheduling=False,
        disable_log_stats=False,
        seed=0,
    )
    params = SamplingParams(
        temperature=0.0,
        max_tokens=job["max_tokens"],
        ignore_eos=True,
        stop_token_ids=job["stop"],
        detokenize=False,
    )
    outputs = [decode(llm, str(index), prompt, params) for index, prompt in enumerate(job["prompts"])]
    drafts, accepted = read_counters(llm)
    result = {"outputs": outputs, "drafts": drafts, "accepted": accepted}
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
