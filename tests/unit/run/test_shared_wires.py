# SPDX-License-Identifier: Apache-2.0
"""What joins the halves: one store and one channel in one process, and nothing that belongs to something else."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from specforge_core.contracts import (
    AccessDenied,
    DataError,
    PartContext,
    SilentProgress,
    StopSignal,
    held_out_sample_id,
    skipped_ref,
)
from specforge_core.features.file_channel import FileChannel
from specforge_core.hooks.builtin import FileChannelConfig
from specforge_core.loading.trusted_refs import TrustedRefs
from specforge_core.run.assemble import Run
from specforge_core.run.directory import RunDirectory
from specforge_core.run.sealed_refs import read_all
from specforge_core.run.wires import RunWires
from specforge_core.testing.samples import make_ref


class SlowPart:
    """A store or channel that takes a moment to open."""

    def __init__(self, section: Any, context: Any) -> None:
        time.sleep(0.05)


def test_halves_that_open_wires_at_once_share_them(tmp_path: Path) -> None:
    part = SimpleNamespace(factory=f"{__name__}:SlowPart")
    section = SimpleNamespace(directory=tmp_path, token_file=None)
    config = SimpleNamespace(run=section, data=SimpleNamespace(features=None))
    plan: Any = SimpleNamespace(
        config=config, run_id="r", feature_store=part, store_section=None, ref_channel=part, channel_section=None
    )
    run = Run(plan, stop=StopSignal(), progress=lambda half: SilentProgress())
    opened: list[Any] = []
    halves = [threading.Thread(target=lambda: opened.append(run.wires["train"])) for _ in range(2)]
    for half in halves:
        half.start()
    for half in halves:
        half.join(timeout=10)
    assert len(opened) == 2
    assert opened[0] is opened[1]


TOKEN = "a secret of thirty-two characters"
REF = skipped_ref("p1.e0", prompt_id="p1", epoch=0)


def wires(
    tmp_path: Path,
    *,
    run_id: str = "r",
    features: str = "f",
    reuse: bool = False,
    token: str | None = None,
    held_out: bool = True,
):
    section = SimpleNamespace(directory=tmp_path, token_file=None)
    if token is not None:
        section.token_file = tmp_path / "token"
        section.token_file.write_text(token)
        section.token_file.chmod(0o600)
    data = SimpleNamespace(features=None, eval=[tmp_path / "held-out.jsonl"] if held_out else [])
    plan: Any = SimpleNamespace(config=SimpleNamespace(run=section, data=data), run_id=run_id, feature_reuse=reuse)

    def fingerprint(split: str) -> str:
        if split == "eval" and not held_out:
            raise DataError("no prompts are given", where="data")  # as preparing them would say
        return f"{features} {split}"

    return RunWires(plan, RunDirectory(tmp_path, tmp_path), fingerprint=fingerprint)


@pytest.mark.parametrize("token", [None, TOKEN])
def test_what_another_run_left_on_the_same_wires_is_refused(tmp_path: Path, token: str | None) -> None:
    """Sample ids are positions in the data, so the refs of two runs look alike."""
    ours = wires(tmp_path, token=token)
    ours.check(ours.sign(REF))
    for other in ({"run_id": "another"}, {"features": "of other layers"}):
        ref = wires(tmp_path, token=token, **other).sign(REF)
        with pytest.raises(DataError if token is None else AccessDenied, match=r"sample p1\.e0: .*another run"):
            ours.check(ref)


@pytest.mark.parametrize("token", [None, TOKEN])
def test_offline_features_belong_to_whoever_captures_the_same(tmp_path: Path, token: str | None) -> None:
    ours = wires(tmp_path, reuse=True, token=token)
    ours.check(wires(tmp_path, run_id="another", reuse=True, token=token).sign(REF))
    with pytest.raises((DataError, AccessDenied)):
        ours.check(wires(tmp_path, features="of other layers", reuse=True, token=token).sign(REF))


def test_held_out_refs_are_of_the_held_out_prompts(tmp_path: Path) -> None:
    ref = skipped_ref(held_out_sample_id("p1"), prompt_id="p1", epoch=0)
    splits = list[str]()
    ours = wires(tmp_path)
    ours._fingerprint = lambda split: splits.append(split) or split
    ours.check(ours.sign(ref))
    assert splits == ["eval", "eval"]


def test_a_strangers_held_out_ref_does_not_end_a_run_that_has_no_held_out_prompts(tmp_path: Path) -> None:
    stranger = skipped_ref(held_out_sample_id("p1"), prompt_id="p1", epoch=0)
    assert wires(tmp_path, token=TOKEN, held_out=False).trusted([stranger]) == []


def test_of_two_refs_of_a_held_out_sample_the_newer_one_counts(tmp_path: Path) -> None:
    """In whatever order they come: an older one may have been replayed."""
    channel = FileChannel(FileChannelConfig(name="file", path=tmp_path), PartContext(run_id="r", directory=tmp_path))
    newer, older = make_ref(0, generation=2), make_ref(0)
    writer = channel.writer("w")
    writer.publish([newer])
    writer.publish([older])
    writer.close()
    assert read_all(channel, [newer.sample_id], trusted=TrustedRefs(lambda ref: None))[0].generation == 2
