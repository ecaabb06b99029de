# SPDX-License-Identifier: Apache-2.0
"""The hf target engine on a CUDA device gives what it gives on CPU, as CPU tensors."""

from __future__ import annotations

import pytest
import torch
from specforge_core.contracts import CaptureRequest, Prompt
from specforge_hf_target.config import HfTargetConfig
from specforge_hf_target.engine import HfTargetEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
REQUEST = CaptureRequest((0, 4, 2), "post")


def test_capture_and_decoding_agree_with_cpu(tiny_model) -> None:
    prompts = [Prompt(f"p{i}", list(range(3, 3 + n)), [1] * n) for i, n in enumerate((5, 17, 1))]
    cpu, gpu = (
        HfTargetEngine(HfTargetConfig(name="hf", path=str(tiny_model.path), device=device))
        for device in ("cpu", "cuda")
    )
    for expected, found in zip(cpu.capture(prompts, REQUEST, 0), gpu.capture(prompts, REQUEST, 0), strict=True):
        for name, tensor in expected.features.items():
            assert found.features[name].device.type == "cpu"
            torch.testing.assert_close(found.features[name], tensor, atol=1e-3, rtol=1e-3)
    token_ids = torch.tensor(prompts[1].input_ids)
    steps = [engine.decoder(REQUEST).forward(token_ids) for engine in (cpu, gpu)]
    torch.testing.assert_close(steps[1].logits, steps[0].logits, atol=1e-3, rtol=1e-3)
