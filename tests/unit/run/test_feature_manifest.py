# SPDX-License-Identifier: Apache-2.0
"""features.json says what a directory's features are of; a damaged or foreign one is an error that names it."""

from __future__ import annotations

import json
import os

import pytest
from specforge_core.contracts import CaptureRequest, DataError
from specforge_core.run.feature_manifest import check_features, describe_features, record_features
from specforge_core.testing.synthetic import TINY_INFO

MANIFEST = describe_features(TINY_INFO, CaptureRequest((1, 2), "post"), prompts="abc")


def test_a_directory_is_claimed_once_and_known_again(tmp_path):
    record_features(tmp_path, MANIFEST)
    record_features(tmp_path, MANIFEST)
    check_features(tmp_path, MANIFEST)


@pytest.mark.parametrize("key", list(MANIFEST))
@pytest.mark.parametrize(
    "value", [None, "x", [], [[[[[[1]]]]]], 7, True, float("nan"), {}, {"hidden_size": [1] * 9999}]
)
def test_whatever_differs_is_shown_in_a_few_words(tmp_path, key, value):
    (tmp_path / "features.json").write_text(json.dumps({**MANIFEST, key: value}))
    with pytest.raises(DataError, match=f"{key}: captured with") as refused:
        check_features(tmp_path, MANIFEST)
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"a":' * 100_000], ids=repr)
def test_a_manifest_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "features.json").write_bytes(content)
    for use in (check_features, record_features):
        with pytest.raises(DataError, match="not readable as JSON") as refused:
            use(tmp_path, MANIFEST)
        assert refused.value.where == str(tmp_path / "features.json")


def test_a_manifest_that_is_no_file_is_neither_followed_nor_waited_for(tmp_path):
    (tmp_path / "elsewhere").write_text(json.dumps(MANIFEST))
    (tmp_path / "features.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="symbolic link"):
        check_features(tmp_path, MANIFEST)
    (tmp_path / "features.json").unlink()
    (tmp_path / "features.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="symbolic link"):
        record_features(tmp_path, MANIFEST)
    (tmp_path / "features.json").unlink()
    os.mkfifo(tmp_path / "features.json")
    with pytest.raises(DataError, match="not a regular file"):
        check_features(tmp_path, MANIFEST)
