# SPDX-License-Identifier: Apache-2.0
"""Data files of a data set on the hub: which they are, at which commit, and where they lie after the download.

Only files are fetched, those of one configuration and split; nothing of the data set's own code is run. Where the hub
cannot be reached, the files that were fetched before are used, if they are complete.
"""

from __future__ import annotations

import fnmatch
import glob
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from specforge_core.contracts import DataError
from specforge_core.contracts.files import read_bytes
from specforge_core.contracts.redaction import SAID_CHARACTERS, show_value

if TYPE_CHECKING:
    from specforge_core.config.run_config import HubSource

_log = logging.getLogger(__name__)

_CARD = "README.md"
_MAX_CARD_BYTES = 4 << 20
"""Text that is parsed for its head; what is larger is no card."""
_TIMEOUT_SECONDS = 30.0
"""For one answer about a data set, not for its files."""
_SPLIT_WORDS = ("train", "training", "test", "testing", "valid", "validation", "val", "dev", "eval", "evaluation")
_SPLITS = {"training": "train", "testing": "test"} | dict.fromkeys(("valid", "val", "dev"), "validation")


@dataclass(frozen=True, slots=True)
class _Listing:
    """The files of one commit; ``folder`` where they are only looked for on this machine."""

    commit: str
    names: Sequence[str]
    folder: Path | None = None


def hub_files(source: HubSource, suffixes: Sequence[str]) -> list[tuple[Path, str, Mapping[str, str]]]:
    """Each data file: where it lies, what messages call it, and where it came from.

    :param suffixes: of the files that can be read.
    :raises DataError: the package is missing, the hub cannot be reached, or there are no such files.
    """
    with _asking(source):
        listing = _list_files(source)
        configs = _card_configs(source, listing) if _CARD in listing.names else []
        chosen = choose_files(
            [name for name in listing.names if name.lower().endswith(tuple(suffixes))], configs, source
        )
        folder = _download(source, listing, chosen)
    origin = {"hub": source.hub, "revision": listing.commit, "split": source.split, "config": source.config or ""}
    return [(folder / name, f"{source.hub}/{name}", origin) for name in chosen]


@contextmanager
def _asking(source: HubSource) -> Iterator[None]:
    """What the hub's package raises is an error of ours."""
    try:
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise DataError(
            "data sets of the hub need the huggingface_hub package",
            where=source.hub,
            hint="pip install 'specforge-core[datasets]'",
        ) from error
    try:
        yield
    except _failures() as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403, 404):
            raise DataError(
                f"the hub has no such data set or revision, or not for you (status {status})",
                where=source.hub,
                hint="correct its name or revision; for a private or gated one log in with `hf auth login`",
            ) from error
        raise DataError(
            f"cannot be had from the hub: {str(error).strip().partition(chr(10))[0][:SAID_CHARACTERS]}",
            where=source.hub,
            hint="check the network, or fetch it where there is one and name the folder instead",
        ) from error


def _failures() -> tuple[type[Exception], ...]:
    """What the hub's package raises: the errors of its HTTP client too, whichever it is built on."""
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HfHubHTTPError

    transport = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    return (OSError, ValueError, CachedRepoTreeNotFoundError, *transport)


def _list_files(source: HubSource) -> _Listing:
    from huggingface_hub import HfApi, get_cached_repo_tree
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().dataset_info(source.hub, revision=source.revision, timeout=_TIMEOUT_SECONDS)
    except _failures() as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        folder = _kept_folder(source)
        if folder is None:
            raise
        _log.warning("%s: the hub cannot be reached; what was fetched before is used: %s", source.hub, folder.name)
        kept = get_cached_repo_tree(source.hub, repo_type="dataset", revision=folder.name)
        return _Listing(folder.name, sorted(file.path for file in kept), folder)
    names = sorted(sibling.rfilename for sibling in info.siblings or ())
    return _Listing(str(info.sha), names)


def _kept_folder(source: HubSource) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source.hub, repo_type="dataset", revision=source.revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        kept = vars(error).get("snapshot_path")  # not all of the data set is there: we fetch what we need only
    return Path(kept) if isinstance(kept, str) else None


def _download(source: HubSource, listing: _Listing, names: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    folder = listing.folder
    if folder is None:  # by branch, so that the branch is found without the hub too
        patterns = [glob.escape(name) for name in names]
        folder = Path(
            snapshot_download(source.hub, repo_type="dataset", revision=source.revision, allow_patterns=patterns)
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or folder.name != listing.commit:
        reason = f"{missing[0]} was not fetched" if missing else "it changed while it was fetched"
        raise DataError(reason, where=source.hub, hint="fetch it again, where the hub can be reached")
    return folder


def _card_configs(source: HubSource, listing: _Listing) -> list[Mapping[str, Any]]:
    """What the data set's card says of its configurations; nothing where it has no such list."""
    path = _download(source, listing, [_CARD]) / _CARD
    text = read_bytes(path.resolve(), limit=_MAX_CARD_BYTES).decode("utf-8", errors="replace")
    if not text.startswith("---"):
        return []
    try:
        values = yaml.safe_load(text[3:].partition("\n---")[0])
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(
            "the head of its card is not valid YAML", where=f"{source.hub}/{_CARD}", hint="fetch it and name the files"
        ) from error
    configs = values.get("configs") if isinstance(values, dict) else None
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def choose_files(names: Sequence[str], configs: Sequence[Mapping[str, Any]], source: HubSource) -> list[str]:
    """The files of the wanted configuration and split.

    The card's word goes first (``configs``); without one, the names of files and folders tell the split, and where
    none does, everything is the training split.

    :raises DataError: there are none.
    """
    described = [config for config in configs if config.get("data_files")]
    if described:
        return _by_card(names, described, source)
    wanted = [name for name in names if source.config is None or source.config in re.split(r"[/.]", name)]
    splits = {name: _split_of(name) for name in wanted}
    split = _SPLITS.get(source.split, source.split)
    chosen = [name for name in wanted if splits[name] == split]
    if not chosen and not any(splits.values()) and split == "train":
        chosen = wanted
    if not chosen:
        raise _no_files(source, names)
    return chosen


def _by_card(names: Sequence[str], configs: Sequence[Mapping[str, Any]], source: HubSource) -> list[str]:
    known = [str(config.get("config_name", "default")) for config in configs]
    default = next((str(config["config_name"]) for config in configs if config.get("default") is True), None)
    wanted = source.config or default or ("default" if "default" in known else known[0])
    if source.config is None and default is None and "default" not in known and len(known) > 1:
        raise DataError(
            f"has several configurations: {', '.join(known)[:SAID_CHARACTERS]}",
            where=source.hub,
            hint=f"name one, such as config: {known[0]}",
        )
    if wanted not in known:
        raise DataError(
            f"has no configuration {show_value(wanted)}",
            where=source.hub,
            hint=f"it has {', '.join(known)[:SAID_CHARACTERS]}",
        )
    patterns = _patterns_of(configs[known.index(wanted)], source.split)
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        raise _no_files(source, names)
    return chosen


def _patterns_of(config: Mapping[str, Any], split: str) -> list[str]:
    given = config["data_files"]
    if isinstance(given, dict):
        given = [{"split": name, "path": path} for name, path in given.items()]
    if not isinstance(given, list):
        given = [given]
    patterns: list[Any] = []
    for entry in given:
        entry = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        if entry.get("split", "train") == split:
            patterns += entry["path"] if isinstance(entry.get("path"), list) else [entry.get("path")]
    folder = str(config.get("data_dir") or "").strip("/")
    written = [pattern.removeprefix("./") for pattern in patterns if isinstance(pattern, str)]
    return [f"{folder}/{pattern}" if folder else pattern for pattern in written]


def _split_of(name: str) -> str | None:
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLIT_WORDS]
    return _SPLITS.get(words[-1], words[-1]) if words else None


def _no_files(source: HubSource, names: Sequence[str]) -> DataError:
    shown = ", ".join(names[:10])[:SAID_CHARACTERS] or "none"
    wanted = f"split {show_value(source.split)}" + (f" of {show_value(source.config)}" if source.config else "")
    return DataError(
        f"has no data files of {wanted}",
        where=source.hub,
        hint=f"files that can be read are: {shown}; some data sets have theirs under revision: refs/convert/parquet",
    )
