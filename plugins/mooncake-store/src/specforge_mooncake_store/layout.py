# SPDX-License-Identifier: Apache-2.0
"""Which objects a sample consists of, and what they are called.

::

    specforge/<run>/s/<sample id>/<generation>.<digest>/<feature>    one tensor's bytes
    specforge/<run>/i/<sample id>                                    the index: its newest generation
    specforge/<run id>/access                                        proof of the token (``access``)

``<run>`` is the run's id, or with a token an HMAC of it, which nobody can guess who only knows the id. ``<digest>`` is
over everything the ref says of the sample, so that a ref that describes something else finds nothing; what is stored
can then be compared with the index. A generation is in the key because the service keeps the *old* bytes where a key
is put a second time, and says that it went well.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass
from urllib.parse import quote

from specforge_core.contracts import FeatureSpec, SampleRef
from specforge_core.contracts.files import parse_json

_MAX_READABLE = 300
MAX_GENERATION = 1 << 62
"""The highest that is read from the index; whoever keeps a generation has 64 bits for it."""


def on_wire(ref: SampleRef) -> list[FeatureSpec]:
    """The tensors that are objects. Empty ones are not: a put of no bytes publishes whatever memory was there."""
    return [spec for spec in ref.features if spec.nbytes]


@dataclass(frozen=True, slots=True)
class IndexRecord:
    """A sample's newest generation, and what is needed to name its objects."""

    generation: int
    digest: str
    features: tuple[str, ...]

    @classmethod
    def of(cls, ref: SampleRef) -> IndexRecord:
        return cls(ref.generation, digest(ref), tuple(spec.name for spec in on_wire(ref)))

    def encode(self) -> bytes:
        return json.dumps([self.generation, self.digest, *self.features]).encode("ascii")

    @classmethod
    def decode(cls, content: bytes) -> IndexRecord | None:
        """None where the bytes are not a record."""
        try:
            record = parse_json(content)
        except ValueError:
            return None
        if type(record) is not list or len(record) < 2:
            return None
        generation, digest, *features = record
        if type(generation) is not int or not 0 < generation <= MAX_GENERATION:
            return None
        if not all(type(text) is str for text in (digest, *features)):
            return None
        return cls(generation, digest, tuple(features))


UNREADABLE = IndexRecord(0, "", ())
"""Stands for an index that this store did not write: older than every generation, and naming no objects."""


def digest(ref: SampleRef) -> str:
    """Over everything a ref says of its sample but the generation, store and signature."""
    specs = sorted((spec.name, spec.shape, spec.dtype, spec.norm or "") for spec in ref.features)
    told = json.dumps([specs, ref.num_tokens, ref.prompt_id, ref.epoch])
    return hashlib.blake2b(told.encode("ascii"), digest_size=9).hexdigest()


class Namespace:
    """The keys of one run."""

    def __init__(self, run_id: str, token: str | None) -> None:
        name = _escape(run_id)
        self.access_key = f"specforge/{name}/access"
        if token is not None:
            told = f"specforge namespace:{run_id}".encode("utf-8", "surrogatepass")
            name = hmac.new(token.encode(), told, hashlib.sha256).hexdigest()
        self._root = f"specforge/{name}"

    def index_key(self, sample_id: str) -> str:
        return f"{self._root}/i/{_escape(sample_id)}"

    def tensor_keys(self, sample_id: str, record: IndexRecord) -> list[str]:
        """One key for each of ``record.features``, in that order."""
        place = f"{self._root}/s/{_escape(sample_id)}/{record.generation}.{record.digest}"
        return [f"{place}/{_escape(name)}" for name in record.features]


def _escape(text: str) -> str:
    """Any text as part of a key: no two texts alike, no separators, bounded in length."""
    escaped = quote(text, safe="", errors="surrogatepass")
    if len(escaped) <= _MAX_READABLE:
        return escaped
    return "=" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()  # quote() leaves no "=" unescaped
