# SPDX-License-Identifier: Apache-2.0
"""What an engine gave back against what was asked of it, before it reaches the store.

An engine is often another program, patched and versioned apart from us. A wrong layer count, a dropped token or a NaN
found here names the sample; found in training it is a loss that does not fall.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from specforge_core.contracts import (
    INPUT_IDS,
    LOSS_MASK,
    CaptureRequest,
    FeatureSpec,
    Prompt,
    Sample,
    TargetError,
)

_HINT = "the target engine does not do what it was asked; `specforge plugins show` names its distribution"


def verify_batch(
    samples: Iterable[Sample], prompts: Sequence[Prompt], *, request: CaptureRequest, hidden_size: int, epoch: int
) -> Iterator[Sample]:
    """The samples, each verified before it is passed on; one per prompt, in order.

    :raises TargetError: too few or too many, or one that is not what was asked for.
    """
    count = 0
    for count, sample in enumerate(samples, start=1):
        if count > len(prompts):
            break
        prompt = prompts[count - 1]
        verify_sample(sample, prompt, request=request, hidden_size=hidden_size, epoch=epoch)
        yield sample
    if count != len(prompts):
        got = "more" if count > len(prompts) else str(count)
        raise TargetError(
            f"{len(prompts)} prompts were given and {got} samples came back",
            where=f"batch from sample {prompts[0].prompt_id}",
            hint=_HINT,
        )


def verify_sample(sample: Sample, prompt: Prompt, *, request: CaptureRequest, hidden_size: int, epoch: int) -> None:
    """:raises TargetError: naming the sample and everything that is wrong with it."""
    wrong = list(_differences(sample, prompt, request, hidden_size))
    if (sample.prompt_id, sample.epoch) != (prompt.prompt_id, epoch):
        wrong.insert(0, f"it is called {sample.sample_id}")
    if wrong:
        raise TargetError(
            "captured features are not what was asked for: " + "; ".join(wrong),
            where=f"sample {prompt.prompt_id}",
            hint=_HINT,
        )


def _differences(sample: Sample, prompt: Prompt, request: CaptureRequest, hidden_size: int) -> Iterator[str]:
    expected = {spec.name: spec for spec in request.specs(prompt.num_tokens, hidden_size)}
    found = {spec.name: spec for spec in sample.specs()}
    if missing := sorted(expected.keys() - found.keys()):
        yield f"{', '.join(missing)} missing"
    if surplus := sorted(found.keys() - expected.keys()):
        yield f"{', '.join(surplus)} not asked for"
    intact = []
    for name in sorted(expected.keys() & found.keys()):
        if found[name] == expected[name]:
            intact.append(name)
        else:
            yield f"{name} is {_describe(found[name])}, expected {_describe(expected[name])}"
    for name in intact:
        tensor = sample.features[name]
        if name == INPUT_IDS and tensor.tolist() != list(prompt.input_ids):
            yield f"{name} are not the prompt's"
        elif name == LOSS_MASK and tensor.tolist() != [bool(item) for item in prompt.loss_mask]:
            yield f"{name} is not the prompt's"
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            rows = (~torch.isfinite(tensor)).flatten(1).any(dim=1).nonzero().flatten()
            yield f"{name} is not finite at token {int(rows[0])} (of {len(rows)} such tokens)"


def _describe(spec: FeatureSpec) -> str:
    norm = f" {spec.norm}-norm" if spec.norm else ""
    return f"{spec.dtype}{norm} {list(spec.shape)}"
