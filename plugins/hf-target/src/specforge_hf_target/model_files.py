# SPDX-License-Identifier: Apache-2.0
"""Where a model's files are: in a local directory, or on the hub (fetched one by one, and only those asked for)."""

from __future__ import annotations

import re
from pathlib import Path

from specforge_core.contracts import TargetError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate_file(model: str, name: str, *, revision: str | None = None) -> Path | None:
    """The local path of one of a model's files, downloaded if the model is a hub id; None if it has no such file.

    :raises TargetError: there is no such model, or the hub cannot be reached.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        path = directory / name
        return path if path.is_file() else None
    if directory.exists():
        raise TargetError("is not a directory", where=f"target.path {model}", hint="name the model's directory")
    if not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise TargetError(
            "there is no such directory", where=f"target.path {model}", hint="correct the path, or name a hub id"
        )
    return _download(model, name, revision)


def contradicts_itself(error: Exception, where: str) -> TargetError:
    """The error for a ``config.json`` that transformers reads and then refuses; its reason comes last."""
    reason = str(error).strip().splitlines()[-1].strip()
    return TargetError(f"config.json contradicts itself: {reason}", where=where, hint="copy the model again")


def _download(model: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"target.path {model}"
    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise TargetError(
            f"there is no such directory, and {name} can be fetched neither from the hub nor from its local cache",
            where=where,
            hint="correct the path, go online, or fetch the model beforehand",
        ) from error
    except EntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise TargetError(
            "access to this model must be granted", where=where, hint="accept its terms on the hub and log in"
        ) from error
    except RevisionNotFoundError as error:
        raise TargetError(
            f"the hub has no revision {revision!r}", where=f"{where}: revision", hint="correct target.revision"
        ) from error
    except RepositoryNotFoundError as error:
        raise TargetError(
            "there is neither such a directory nor such a model on the hub", where=where, hint="correct target.path"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise TargetError(
            f"the hub cannot be reached: {error}", where=where, hint="go online, or name a local directory"
        ) from error
