# SPDX-License-Identifier: Apache-2.0
"""Writes a draft for serving and believes it only after reading it back. Stage 8: the end of a run's data flow.

The strategy writes into a directory aside; the result is loaded again, every tensor is compared bit by bit and both
drafts must propose the same tokens on a fixed probe; only then is the directory renamed into place. Servers load a
draft with a missing weight silently, so nothing less will do.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from specforge_core.contracts import (
    AUX_HIDDEN_STATES,
    LAST_HIDDEN_STATES,
    CaptureRequest,
    ExportError,
    FrozenSource,
    Strategy,
    TargetInfo,
)
from specforge_core.contracts.files import describe_file, make_directory, read_json_object

PROVENANCE_FILE = "specforge.json"
PROBE_TOKENS = 8
"""Enough for every layer to see a context; the comparison takes a moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """What is written where.

    :param format: one that the strategy writes.
    :param provenance: strategy, versions, step and the like; goes into ``specforge.json`` beside the weights, with
        size and digest of every other file.
    :param overwrite: replace what is in the directory.
    """

    directory: Path
    format: str
    provenance: Mapping[str, object]
    overwrite: bool = False


def export_draft(strategy: Strategy, draft: nn.Module, target: FrozenSource, *, plan: ExportPlan) -> Path:
    """Write, read back, compare, and only then make visible.

    :returns: the directory.
    :raises ExportError: the directory is in use, cannot be written, or does not reload to the same draft.
    """
    directory = plan.directory
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ExportError("there is a file of that name", where=str(directory), hint="choose another directory")
    if directory.is_dir() and any(directory.iterdir()) and not plan.overwrite:
        raise ExportError("this directory is not empty", where=str(directory), hint="remove it, or say --overwrite")
    aside = directory.with_name(
        f".{directory.name}.writing-{secrets.token_hex(6)}"
    )  # a name that nobody can have planted
    try:
        make_directory(directory.parent)
        aside.mkdir()
        strategy.export(draft, aside, format=plan.format, target=target.info)
        _write_provenance(aside / PROVENANCE_FILE, plan, target.info)
        _verify(strategy, draft, strategy.load_export(aside, target), target)
        _sync(aside)
        _replace(aside, directory)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise ExportError(
            f"the export cannot be written: {reason or error}",
            where=str(directory),
            hint="free space or choose another directory; what was there before is unchanged",
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory


def _write_provenance(path: Path, plan: ExportPlan, info: TargetInfo) -> None:
    files = {name: describe_file(path.parent / name) for name in _files(path.parent)}
    facts = {"format": plan.format, "target": info.name_or_path, **plan.provenance, "files": files}
    path.write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")


def check_export(directory: Path) -> None:
    """Compare an export of ours with what it was when it was written; one of another trainer's says nothing of itself.

    :raises ExportError: a file was altered, removed or added since.
    """
    record = directory / PROVENANCE_FILE
    if not os.path.lexists(record):
        return
    recorded = read_json_object(record, refuse=lambda reason: _altered(record, reason)).get("files")
    if recorded is None:  # written by an earlier version
        return
    if not isinstance(recorded, dict):
        raise _altered(record, "its files are no table")
    found = _files(directory)
    for name in sorted(recorded.keys() | set(found)):
        if name not in found:
            raise _altered(directory / name[:200], "it is missing")
        # Resolved: where exports are downloaded to, files are often links into a cache.
        if name not in recorded or describe_file((directory / name).resolve()) != recorded[name]:
            raise _altered(directory / name, "its bytes are not the ones that were written")


def _files(directory: Path) -> list[str]:
    """Every file of an export but its record."""
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in found if name != PROVENANCE_FILE)


def _altered(path: Path, reason: str) -> ExportError:
    return ExportError(
        f"altered since it was exported: {reason}",
        where=str(path),
        hint=f"export the draft again; or remove {PROVENANCE_FILE} if you mean it to be read as it is",
    )


def _verify(strategy: Strategy, written: nn.Module, read: nn.Module, target: FrozenSource) -> None:
    """:raises ExportError: the draft that was read back is not the one that was written."""
    expected, found = written.state_dict(), read.state_dict()
    if expected.keys() != found.keys():
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        raise ExportError(f"reloading gives other tensors: missing {missing}, unexpected {extra}", hint=_BUG)
    for name, tensor in expected.items():
        if not _same_bits(tensor, found[name]):
            raise ExportError("reloading changes this tensor", where=name, hint=_BUG)
    info = target.info
    request = strategy.capture_request(info)
    proposals = [_probe(strategy, draft, target, request) for draft in (written, read)]
    if not torch.equal(*proposals):
        raise ExportError(
            f"the reloaded draft proposes {proposals[1].tolist()}, the one written {proposals[0].tolist()}", hint=_BUG
        )


_BUG = "the strategy's export and load_export disagree; nothing was left behind"


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    a, b = (tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(a, b)


def _probe(strategy: Strategy, draft: nn.Module, target: FrozenSource, request: CaptureRequest) -> Tensor:
    """What a draft proposes after fixed tokens with fixed random features."""
    info = target.info
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, request.dtype)
    features: dict[str, Tensor] = {}
    for spec in request.specs(PROBE_TOKENS, info.hidden_size):
        if spec.name in (AUX_HIDDEN_STATES, LAST_HIDDEN_STATES):
            features[spec.name] = torch.randn(spec.shape, generator=generator).to(dtype)
    token_ids = torch.randint(info.vocab_size, (PROBE_TOKENS + 1,), generator=generator)
    was_training = draft.training
    draft.eval()
    try:
        with torch.no_grad():
            drafter = strategy.drafter(draft, target)
            drafter.reset()
            drafter.extend(token_ids, features)
            return drafter.propose(drafter.max_draft_tokens).cpu()
    finally:
        draft.train(was_training)


def _sync(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(aside: Path, directory: Path) -> None:
    """Rename into place; what was there before goes only once the new export stands."""
    former = directory.with_name(f".{directory.name}.former-{secrets.token_hex(6)}")
    if directory.is_dir():
        os.rename(directory, former)
    try:
        os.rename(aside, directory)
    except OSError:
        if former.is_dir():
            os.rename(former, directory)
        raise
    shutil.rmtree(former, ignore_errors=True)
