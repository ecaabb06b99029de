# SPDX-License-Identifier: Apache-2.0
"""Names of samples and writers: which of them may become file names, and the ref that describes a sample."""

from __future__ import annotations

from specforge_core.contracts import INPUT_IDS, Sample, SampleRef, StoreError

_MAX_NAME_BYTES = 200


def describe_sample(sample_id: str, sample: Sample, *, generation: int, store: str) -> SampleRef:
    """The unsigned ref of a sample as it is being put.

    :raises StoreError: a sample without ``input_ids``, or an id that is empty.
    """
    if not sample_id:
        raise StoreError("an empty sample id")
    if INPUT_IDS not in sample.features:
        raise StoreError(f"a sample without {INPUT_IDS}", where=sample_id)
    return SampleRef(
        sample_id=sample_id,
        generation=generation,
        store=store,
        features=sample.specs(),
        num_tokens=sample.num_tokens,
        prompt_id=sample.prompt_id,
        epoch=sample.epoch,
    )


def file_name_problem(name: str) -> str | None:
    """Why ``name`` cannot be part of a file name, or None where it can."""
    if not name:
        return "it is empty"
    if name.startswith("."):
        return "it begins with a dot"
    if any(character in "/\\" or not character.isprintable() for character in name):
        return "it holds a separator or an unprintable character"
    if len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES:
        return f"it is longer than {_MAX_NAME_BYTES} bytes"
    return None
