# SPDX-License-Identifier: Apache-2.0
"""The records that move between stages: prompts, what is captured of them, and the refs that point at it.

Records are frozen and small. Tensors appear in :class:`Sample` and :class:`Batch` only; a :class:`SampleRef` is pure
metadata and is checked to be so before it is published.

Feature names and shapes (T tokens, L captured layers, H target hidden size):

==================== ============ =============================================================
``input_ids``        int64 [T]    the prompt, response included
``loss_mask``        bool  [T]    trained positions
``aux_hidden_states`` [T, L, H]   outputs of ``aux_layer_ids`` (zero-based decoder layers)
``last_hidden_states`` [T, H]     the last layer's output, before (``pre``) or after (``post``) the final norm
==================== ============ =============================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from specforge_core.contracts.errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor

Norm = Literal["pre", "post"]

INPUT_IDS = "input_ids"
LOSS_MASK = "loss_mask"
AUX_HIDDEN_STATES = "aux_hidden_states"
LAST_HIDDEN_STATES = "last_hidden_states"

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "uint8": 1,
    "bool": 1,
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids with the response included, and which of them are trained.

    ``input_ids`` and ``loss_mask`` have the same length; the mask holds 0 and 1.
    """

    prompt_id: str
    input_ids: Sequence[int]
    loss_mask: Sequence[int]

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """Name, shape and dtype of one stored tensor; ``norm`` only for ``last_hidden_states``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    norm: Norm | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


_MOST_DIMENSIONS = 8
"""Features have three."""
_MOST_ELEMENTS = 1 << 40
"""A sample of a hundred million tokens and ten thousand values each has a trillion; in bytes it fits 64 bits."""


def is_plausible_shape(dimensions: Sequence[Any]) -> bool:
    """Whether a tensor may have this shape: what others wrote can name one whose size no library computes."""
    if len(dimensions) > _MOST_DIMENSIONS or not all(type(n) is int and 0 <= n <= _MOST_ELEMENTS for n in dimensions):
        return False
    elements: int = math.prod(max(n, 1) for n in dimensions)
    return elements <= _MOST_ELEMENTS


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """What a strategy wants captured, besides ``input_ids`` and ``loss_mask``, which always travel.

    :param aux_layer_ids: zero-based decoder layers whose output becomes ``aux_hidden_states``, in this order.
    :param last_hidden_norm: ``last_hidden_states`` ``pre`` or ``post`` the final norm; None: not wanted.
    :param dtype: element type of the captured hidden states.
    """

    aux_layer_ids: tuple[int, ...] = ()
    last_hidden_norm: Norm | None = None
    dtype: str = "float32"

    @property
    def features(self) -> tuple[str, ...]:
        names = [INPUT_IDS, LOSS_MASK]
        if self.aux_layer_ids:
            names.append(AUX_HIDDEN_STATES)
        if self.last_hidden_norm is not None:
            names.append(LAST_HIDDEN_STATES)
        return tuple(names)

    def specs(self, num_tokens: int, hidden_size: int) -> tuple[FeatureSpec, ...]:
        """The exact tensors one sample of ``num_tokens`` must consist of, in a fixed order."""
        specs = [FeatureSpec(INPUT_IDS, (num_tokens,), "int64"), FeatureSpec(LOSS_MASK, (num_tokens,), "bool")]
        if self.aux_layer_ids:
            shape = (num_tokens, len(self.aux_layer_ids), hidden_size)
            specs.append(FeatureSpec(AUX_HIDDEN_STATES, shape, self.dtype))
        if self.last_hidden_norm is not None:
            specs.append(
                FeatureSpec(LAST_HIDDEN_STATES, (num_tokens, hidden_size), self.dtype, norm=self.last_hidden_norm)
            )
        return tuple(specs)


def sample_id(prompt_id: str, epoch: int) -> str:
    """The id of one prompt's features as captured for one epoch (offline captures are epoch 0)."""
    return f"{prompt_id}.e{epoch}"


def held_out_sample_id(prompt_id: str) -> str:
    """The id of a held-out prompt's features; no training sample can have it, also where their prompts share an id."""
    return f"{prompt_id}.held-out"


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt's captured features, tensors included."""

    prompt_id: str
    epoch: int
    features: Mapping[str, Tensor]
    last_hidden_norm: Norm | None = None

    @property
    def sample_id(self) -> str:
        return sample_id(self.prompt_id, self.epoch)

    @property
    def num_tokens(self) -> int:
        return int(self.features[INPUT_IDS].shape[0])

    def specs(self) -> tuple[FeatureSpec, ...]:
        """What is actually in ``features``, sorted by name."""
        return tuple(
            FeatureSpec(
                name=name,
                shape=tuple(int(n) for n in tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                norm=self.last_hidden_norm if name == LAST_HIDDEN_STATES else None,
            )
            for name, tensor in sorted(self.features.items())
        )


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where one sample's features are and what they consist of; metadata only.

    States of a ref: published → delivered → trained → acked. ``generation`` is bumped by each ``put`` of the same
    sample id; a ref of an earlier generation is stale. ``signature`` is an HMAC, "" until the ref is signed to be
    published; where no token is configured its key is public, and it only tells runs apart.
    A ref without features stands for a sample that was skipped: a member of its window that weighs nothing.

    :param digest: BLAKE3 of the features' bytes (see ``features.contents``), so that the signature covers them too;
        "" where no token is configured.
    :param origin: where this process read the ref (a file and offset, an entry), for messages; neither recorded nor
        signed, and no part of what makes two refs equal.
    """

    sample_id: str
    generation: int
    store: str
    features: tuple[FeatureSpec, ...]
    num_tokens: int
    prompt_id: str
    epoch: int
    signature: str = ""
    digest: str = ""
    origin: str = field(default="", compare=False)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.features)

    @property
    def skipped(self) -> bool:
        return not self.features


def describe_sample(sample_id: str, sample: Sample, *, store: str) -> SampleRef:
    """The unsigned ref of a sample as it is being put; its generation (here 0) is the store's to draw.

    :raises StoreError: a sample without ``input_ids``, or an id that is empty.
    """
    if not sample_id:
        raise StoreError("an empty sample id")
    if INPUT_IDS not in sample.features:
        raise StoreError(f"a sample without {INPUT_IDS}", where=sample_id)
    return SampleRef(
        sample_id=sample_id,
        generation=0,
        store=store,
        features=sample.specs(),
        num_tokens=sample.num_tokens,
        prompt_id=sample.prompt_id,
        epoch=sample.epoch,
    )


def skipped_ref(sample_id: str, *, prompt_id: str, epoch: int) -> SampleRef:
    """The ref of a sample that was set aside: nothing of it is in any store."""
    return SampleRef(sample_id, 0, "", (), 0, prompt_id, epoch)


_PLAIN = frozenset({str, int, float, bool, type(None)})
_INTEGER = frozenset({int})
_METADATA = tuple(item.name for item in fields(SampleRef) if item.name != "features")
_metadata_of = attrgetter(*_METADATA)


def check_metadata_only(ref: SampleRef) -> None:
    """Refuse a control record that holds anything but plain values.

    :raises TypeError: naming the field that holds a tensor or another object.
    """
    if not _PLAIN.issuperset(map(type, _metadata_of(ref))):  # once per ref published
        [name, *_] = [name for name in _METADATA if type(getattr(ref, name)) not in _PLAIN]
        found = type(getattr(ref, name)).__name__
        raise TypeError(f"SampleRef.{name} of {ref.sample_id!r} holds a {found}, not metadata")
    for spec in ref.features:
        if not isinstance(spec, FeatureSpec) or not _INTEGER.issuperset(map(type, spec.shape)):
            raise TypeError(f"SampleRef.features of {ref.sample_id!r} holds a {type(spec).__name__}, not metadata")


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """What is known of a target from its configuration alone, without loading it.

    Head counts, sizes and RoPE parameters are there because a draft usually inherits them.
    """

    name_or_path: str
    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    dtype: str
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_parameters: Mapping[str, float | int | str | Sequence[float]] = field(default_factory=dict)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, collated.

    :param tensors: whatever the strategy's ``loss`` reads.
    :param denominators: what the strategy's loss terms divide by, counted over this micro-batch only. They come from
        masks; the trainer sums them over the whole window and all ranks before the first backward.
    """

    tensors: Mapping[str, Tensor]
    denominators: Mapping[str, float]
    num_samples: int
    num_tokens: int

    def to(self, device: str) -> Batch:
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return Batch(moved, self.denominators, self.num_samples, self.num_tokens)
