# SPDX-License-Identifier: Apache-2.0
"""Signed refs: what was forged, altered or published in another run is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
from specforge_core.contracts import AccessDenied, FeatureSpec, SampleRef, access_proof, check_signature, locate, sign
from specforge_core.testing.samples import make_ref

TOKEN, RUN = "a shared secret", "run-7"
SPEC = FeatureSpec("input_ids", (4,), "int64")
OTHER_VALUES = {
    "sample_id": ["prompt-8.e0", "", "prompt-7.e0 "],
    "generation": [0, 2, 10**12],
    "store": ["mooncake", ""],
    "features": [(), (SPEC,), (SPEC, SPEC)],
    "num_tokens": [0, 99],
    "prompt_id": ["prompt-8", ""],
    "epoch": [1, -1],
    "digest": ["00", "x"],
}


def signed(number: int = 7) -> SampleRef:
    return sign(make_ref(number), token=TOKEN, run_id=RUN)


def assert_refused(ref: SampleRef, *, token: str = TOKEN, run_id: str = RUN) -> None:
    with pytest.raises(AccessDenied) as refusal:
        check_signature(ref, token=token, run_id=run_id)
    assert isinstance(refusal.value, PermissionError)
    assert not token or token not in str(refusal.value)


def test_what_was_signed_is_accepted() -> None:
    check_signature(signed(), token=TOKEN, run_id=RUN)
    assert replace(signed(), signature="") == make_ref(7)
    assert sign(signed(), token=TOKEN, run_id=RUN) == signed()


def test_unsigned_is_refused_and_says_so() -> None:
    with pytest.raises(AccessDenied, match="not signed"):
        check_signature(make_ref(7), token=TOKEN, run_id=RUN)


@pytest.mark.parametrize("signature", ["x", "A" * 22, "é", "\ud800", signed().signature[:-1], signed().signature + "="])
def test_forged_is_refused(signature: str) -> None:
    assert_refused(replace(signed(), signature=signature))


def test_a_refused_ref_is_located() -> None:
    forged = replace(make_ref(7), origin="refs/stranger.refs, offset 72")
    with pytest.raises(AccessDenied, match=r"sample prompt-7\.e0 \(refs/stranger\.refs, offset 72\)"):
        check_signature(forged, token=TOKEN, run_id=RUN)


def test_a_ref_of_any_id_is_named_in_one_line() -> None:
    assert locate(replace(make_ref(7), sample_id="\x1b[2J\n")) == "sample '\\x1b[2J\\n'"
    assert len(locate(replace(make_ref(7), sample_id="x" * 10**6))) < 300


def test_another_run_or_token_is_refused() -> None:
    for run_id in ("run-8", "", "run-7 "):
        assert_refused(signed(), run_id=run_id)
    for token in ("a shared secre", "", "A shared secret"):
        assert_refused(signed(), token=token)


def test_the_signature_of_another_ref_is_refused() -> None:
    assert_refused(replace(make_ref(7), signature=signed(8).signature))
    assert_refused(replace(make_ref(7, generation=2), signature=signed().signature))


def other_values(name: str) -> Iterator[object]:
    own = getattr(make_ref(7), name)
    return (value for value in OTHER_VALUES[name] if value != own)


@pytest.mark.parametrize(
    "name", [field.name for field in fields(SampleRef) if field.name not in ("signature", "origin")]
)
def test_every_field_is_covered(name: str) -> None:
    """A field that is added to refs must be signed too, and named here."""
    for value in other_values(name):
        assert_refused(replace(signed(), **{name: value}))


@pytest.mark.parametrize("name", [field.name for field in fields(FeatureSpec)])
def test_every_field_of_a_feature_is_covered(name: str) -> None:
    others = {"name": "loss_mask", "shape": (5,), "dtype": "int32", "norm": "pre"}
    ref = sign(replace(make_ref(7), features=(SPEC,)), token=TOKEN, run_id=RUN)
    check_signature(ref, token=TOKEN, run_id=RUN)
    assert_refused(replace(ref, features=(replace(SPEC, **{name: others[name]}),)))


def test_what_moves_from_one_field_to_the_next_is_refused() -> None:
    """No two different refs are the same text to be signed."""
    ref = replace(make_ref(7), sample_id="a", store="b", prompt_id="c")
    signature = sign(ref, token=TOKEN, run_id=RUN).signature
    for sample_id, store, prompt_id in (("ab", "", "c"), ("a", "bc", ""), ('a","b', "b", "c"), ("b", "a", "c")):
        assert_refused(replace(ref, sample_id=sample_id, store=store, prompt_id=prompt_id, signature=signature))
    one, three = (SPEC, replace(SPEC, name="x")), (replace(SPEC, name="x"), SPEC)
    signature = sign(replace(ref, features=one), token=TOKEN, run_id=RUN).signature
    assert_refused(replace(ref, features=three, signature=signature))


def test_ids_of_any_text_can_be_signed() -> None:
    for text in ("", "語", "\x00", "\ud800", '"\\'):
        ref = replace(make_ref(7), sample_id=text, prompt_id=text)
        check_signature(sign(ref, token=TOKEN, run_id=RUN), token=TOKEN, run_id=RUN)


def test_a_proof_is_of_one_token_and_one_purpose() -> None:
    proofs = {access_proof(token, purpose=purpose) for token in ("a", "b") for purpose in ("x", "y")}
    assert len(proofs) == 4
    assert access_proof("a", purpose="x") == access_proof("a", purpose="x")
    assert signed().signature not in access_proof(TOKEN, purpose=RUN)
