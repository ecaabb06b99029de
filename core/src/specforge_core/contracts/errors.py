# SPDX-License-Identifier: Apache-2.0
"""Every error a user can cause, and every failure one half of a run reports to the other.

A :class:`SpecForgeError` is shown as one message without a traceback and ends the command with exit status 2;
anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class SpecForgeError(Exception):
    """Something the user can act on.

    :param message: what is wrong, in one sentence.
    :param where: file and key, sample or part it was found in.
    :param hint: what to do about it.
    """

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message, where, hint)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        located = f"{self.where}: {self.message}" if self.where else self.message
        return f"{located} ({self.hint})" if self.hint else located

    def __reduce__(self) -> tuple[Callable[..., SpecForgeError], tuple[Any, ...]]:
        """So that an error can be sent to another process: by its fields, whatever its own constructor takes."""
        return _rebuild, (type(self), self.message, self.where, self.hint)


def _rebuild(kind: type[SpecForgeError], message: str, where: str, hint: str) -> SpecForgeError:
    error = kind.__new__(kind)
    SpecForgeError.__init__(error, message, where=where, hint=hint)
    return error


class ConfigError(SpecForgeError):
    """A run file that cannot be used as it is written."""


class PluginError(SpecForgeError):
    """A plugin that is missing, broken, in conflict or misdeclared."""


class PlanError(SpecForgeError):
    """Parts that do not fit together; carries every mismatch found, not the first."""

    def __init__(self, mismatches: list[str], *, where: str = "") -> None:
        self.mismatches = list(mismatches)
        super().__init__("the run cannot be composed:\n" + "\n".join(f"  - {m}" for m in mismatches), where=where)


class DataError(SpecForgeError):
    """Prompts or features that are missing, empty or malformed."""


class RunMismatch(DataError):
    """This process was given other prompts, another target or other features than the run it joined: it leaves."""


class TargetError(SpecForgeError):
    """A target that cannot be read, or whose captured features are not what was asked for."""


class CheckpointError(SpecForgeError):
    """A checkpoint that is missing, incomplete or of another run."""


class ExportError(SpecForgeError):
    """An export that cannot be written, or that does not reload to what was written."""


class BenchError(SpecForgeError):
    """Speculative decoding that did not reproduce the target's own output."""


class StoreError(SpecForgeError):
    """A feature store that cannot do what was asked."""


class FeatureGone(StoreError):
    """`get` of features that were deleted."""


class StaleRef(StoreError):
    """`get` with a ref whose generation was replaced by a later `put`."""


class FeatureCorrupt(StoreError):
    """Stored bytes that are short, torn or not what the ref describes."""


class StoreFull(StoreError):
    """`put` with no room left; nothing was evicted and nothing partial was kept."""


class AccessDenied(SpecForgeError, PermissionError):
    """A shared secret that is missing or wrong: a store that is not ours to attach to, a ref that nobody signed."""


class ChannelError(SpecForgeError):
    """A ref channel that cannot do what was asked."""


class ChannelFailed(ChannelError):
    """The other half of the run failed; the message is its reason."""


class PeerDied(ChannelFailed):
    """Every process of the other half ended without a word. Another may take its place, so this may be waited out."""


class DeadlineExceeded(SpecForgeError):
    """A wait that reached its end; names what was waited for."""


class RunStopped(SpecForgeError):
    """The run was asked to stop (Ctrl-C, or the other half failed) and left cleanly."""
