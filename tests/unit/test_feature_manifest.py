# SPDX-License-Identifier: Apache-2.0
"""What a directory of features says it holds is compared, never believed, and never written through a link."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from specforge_core.contracts import DataError
from specforge_core.run.feature_manifest import check_features, record_features

MANIFEST = {"target": {"name_or_path": "m", "num_layers": 4}, "request": {"aux_layer_ids": [1, 2]}, "prompts": "abc"}


def test_a_directory_is_claimed_once_and_found_again(tmp_path: Path) -> None:
    record_features(tmp_path, MANIFEST)
    record_features(tmp_path, MANIFEST)
    check_features(tmp_path, MANIFEST)
    with pytest.raises(DataError, match="prompts: captured with 'abc', this run has 'other'"):
        check_features(tmp_path, MANIFEST | {"prompts": "other"})


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "null", "{", "[" * 100_000, '{"target":' * 50_000, '{"target": ' + "9" * 5000 + "}"),
        *('{"target": 1, "request": [1], "prompts": {"a": NaN}}', '{"prompts": 1e400}', "{}"),
        json.dumps({"target": "x" * 500_000, "request": list(range(50_000))}),
        json.dumps(MANIFEST | {"prompts": "x" * 2_000_000}),
    ],
    ids=range(12),
)
def test_a_manifest_of_anything_else_is_refused_in_few_words(tmp_path: Path, content: str) -> None:
    (tmp_path / "features.json").write_text(content)
    for use in (check_features, record_features):
        with pytest.raises(DataError) as raised:
            use(tmp_path, MANIFEST)
        assert str(tmp_path) in raised.value.where
        assert raised.value.hint
        assert len(str(raised.value)) < 2000 + len(str(tmp_path))
    assert (tmp_path / "features.json").read_text() == content


def test_a_manifest_that_is_a_link_or_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(json.dumps(MANIFEST))
    (tmp_path / "features.json").symlink_to(tmp_path / "elsewhere")
    for use in (check_features, record_features):
        with pytest.raises(DataError, match="symbolic link"):
            use(tmp_path, MANIFEST)
    (tmp_path / "elsewhere").unlink()  # the link leads nowhere now
    with pytest.raises(DataError, match="symbolic link"):
        record_features(tmp_path, MANIFEST)
    (tmp_path / "features.json").unlink()
    os.mkfifo(tmp_path / "features.json")
    with pytest.raises(DataError, match="not a regular file"):
        check_features(tmp_path, MANIFEST)
