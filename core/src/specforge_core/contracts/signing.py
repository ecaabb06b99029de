# SPDX-License-Identifier: Apache-2.0
"""The shared secret: refs signed with it, and the proof that a store was made with it.

A ref says which bytes to train on, so whoever can write into a channel could train a draft on anything. With a token,
a ref is trusted only where its HMAC-SHA256 (RFC 2104) over every field and the run's id is right: one that was forged,
altered, or published in another run is refused. One of the fields is the digest of the sample's bytes, so that whoever
can write into the store cannot have other bytes trained either.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import replace

from specforge_core.contracts.errors import AccessDenied
from specforge_core.contracts.records import SampleRef

_SHOWN_CHARACTERS = 200
"""Of a sample id in a message; ids of ours are no longer, since they name files."""
_SIGNATURE_BYTES = 16
"""Half of the digest, as RFC 2104 allows: 128 bits, 22 characters in every ref."""


def sign(ref: SampleRef, *, token: str, run_id: str) -> SampleRef:
    """The ref with its signature."""
    return replace(ref, signature=_signature(ref, token, run_id))


def check_signature(ref: SampleRef, *, token: str, run_id: str) -> None:
    """:raises AccessDenied: the ref was not signed with this token for this run."""
    found = ref.signature.encode("utf-8", "surrogatepass")
    if not hmac.compare_digest(found, _signature(ref, token, run_id).encode()):
        fault = "is not signed" if not ref.signature else "has a signature that this run's token did not make"
        raise AccessDenied(
            f"the ref {fault}: it was forged, altered, or published by another run",
            where=locate(ref),
            hint="give every capture process the same token and run.id as the train role, and nobody else",
        )


def locate(ref: SampleRef) -> str:
    """The sample of a ref and where the ref stands, for messages. A stranger's ref may have any text for an id."""
    name = ref.sample_id[:_SHOWN_CHARACTERS]
    return f"sample {name if name.isprintable() else ascii(name)}{f' ({ref.origin})' if ref.origin else ''}"


def access_proof(token: str, *, purpose: str) -> str:
    """What a store keeps so that whoever attaches can be asked for the token without the token being stored.

    :param purpose: what is guarded (a store's directory or namespace), so that a proof is of no use elsewhere.
    """
    return hmac.new(token.encode(), f"specforge access:{purpose}".encode(), hashlib.sha256).hexdigest()


def _signature(ref: SampleRef, token: str, run_id: str) -> str:
    features = [[spec.name, list(spec.shape), spec.dtype, spec.norm] for spec in ref.features]
    names = [run_id, ref.sample_id, ref.generation, ref.store, ref.num_tokens, ref.prompt_id, ref.epoch]
    fields = [*names, features, ref.digest]
    digest = hmac.new(token.encode(), json.dumps(fields).encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest[:_SIGNATURE_BYTES]).rstrip(b"=").decode()
