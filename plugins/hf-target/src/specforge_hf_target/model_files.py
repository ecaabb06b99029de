# SPDX-License-Identifier: Apache-2.0
"""Where a model's files are: in a local directory, or on the hub (fetched one by one, and only those asked for)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from specforge_core.contracts import DataError, SpecForgeError, TargetError
from specforge_core.contracts.files import read_json_object

MAX_TEXT_BYTES = 256 << 20
"""The longest text file of a model that a library is let read: the largest tokenizer.json in use has some 40 MB."""

_TEXTS = (".json", ".jinja", ".txt", ".model")
_COPY_AGAIN = "copy the model again"
_LONGEST_REASON = 300  # characters of a library's own words; one line on a wide terminal says enough
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def local_directory(model: str) -> Path:
    """Where a model is if it is a directory; ``~user`` of a user who is not there means itself."""
    with suppress(RuntimeError):
        return Path(model).expanduser()
    return Path(model)


def locate_file(model: str, name: str, *, revision: str | None = None) -> Path | None:
    """The local path of one of a model's files, downloaded if the model is a hub id; None if it has no such file.

    :raises TargetError: there is no such model, or the hub cannot be reached.
    """
    directory = local_directory(model)
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


def read_model_json(path: Path) -> dict[str, Any]:
    """One of a model's JSON files, as :func:`locate_file` found it. Caches of the hub hold links to them.

    :raises TargetError: it is not a JSON object.
    """

    def refuse(reason: str) -> TargetError:
        return TargetError(f"not readable as JSON: {reason}", where=str(path), hint=_COPY_AGAIN)

    return read_json_object(path.resolve(), refuse=refuse)


def check_text_files(model: str) -> None:
    """:raises TargetError: a text file in a model's directory is so long that reading it would take the machine."""
    directory = local_directory(model)
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.suffix in _TEXTS and path.is_file() and path.stat().st_size > MAX_TEXT_BYTES:
            raise TargetError(f"is longer than {MAX_TEXT_BYTES} bytes", where=str(path), hint=_COPY_AGAIN)


@contextmanager
def refusing(
    what: str, *, where: str = "", hint: str, kind: type[TargetError | DataError] = TargetError
) -> Iterator[None]:
    """What a library raises over a model's files, of whatever kind, ends as one of ours: a boundary to foreign code.

    transformers promises no kinds of errors (over a config.json alone AttributeError, AssertionError, TypeError and
    more), a template raises what its expressions raise, and tokenizers raises bare ``Exception`` and Rust's panics.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except SpecForgeError:
        raise
    except StrictDataclassError as error:  # config.json is read and then refused; the reason comes last
        reason = str(error).strip().splitlines()[-1].strip()
        raise kind(
            f"config.json contradicts itself: {reason[:_LONGEST_REASON]}", where=where, hint=_COPY_AGAIN
        ) from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Ctrl-C and its like
            raise
        raise kind(f"{what}: {first_line(error)}", where=where, hint=hint) from error


def first_line(error: BaseException) -> str:
    """The first line that an error says, or its type where that says nothing alone."""
    first = (str(error).strip().splitlines() or [""])[0][:_LONGEST_REASON]
    return f"{type(error).__name__}: {first}" if isinstance(error, KeyError) or not first else first


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
