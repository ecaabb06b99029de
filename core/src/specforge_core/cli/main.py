# SPDX-License-Identifier: Apache-2.0
"""The ``specforge`` command's entry: where errors become messages and exit statuses. ``cli.app`` holds the commands."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from specforge_core.cli.environment import disabled_by_environment
from specforge_core.contracts.errors import RunStopped, SpecForgeError
from specforge_core.contracts.redaction import redact_message, visible

EXIT_ERROR = 2
"""For what a user can mend; a bug ends with a traceback and 1."""
EXIT_INTERRUPTED = 130
"""128 and the number of SIGINT, as shells have it."""
_UNUSABLE_NAME = (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)
"""A path that somebody wrote somewhere, and nothing can even be asked about."""
_SHOWN_CHARACTERS = 200
"""Of a file name in an error."""


def _list_plugins_at_once(*, as_json: bool) -> None:
    """The plain listing without the command parser: importing it, and what it imports, takes longer than listing."""
    from specforge_core.cli.plugin_list import print_plugins

    print_plugins(disabled_by_environment(), as_json=as_json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0, 1 where it found something wrong, 2 for errors, 130 for Ctrl-C.

    What a user can act on is one message on standard error; anything else is a bug and keeps its traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given in (["plugins"], ["plugins", "--json"]):
            _list_plugins_at_once(as_json="--json" in given)
            sys.exit(0)
        from specforge_core.cli.app import app

        app(args=given, prog_name="specforge")
    except RunStopped as stopped:
        sys.stderr.write(f"{visible(redact_message(str(stopped)))}\n")
        sys.exit(EXIT_INTERRUPTED)
    except SpecForgeError as error:
        sys.stderr.write(f"{format_error(error)}\n")
        sys.exit(EXIT_ERROR)
    except OSError as error:
        if error.errno not in _UNUSABLE_NAME or error.filename is None:
            raise
        sys.stderr.write(f"{redact_message(f'error: {str(error.filename)[:_SHOWN_CHARACTERS]}: {error.strerror}')}\n")
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(EXIT_INTERRUPTED)


def format_error(error: SpecForgeError) -> str:
    """What, where and what to do, as plain text: ``error: WHERE: MESSAGE``, then the hint on a line of its own.

    Passwords of addresses are hidden here at the latest, and control characters spelt out: a message may quote a
    library, or a file that somebody else wrote.
    """
    located = f"{error.where}: {error.message}" if error.where else error.message
    lines = [f"error: {located}", *getattr(error, "__notes__", [])]
    if error.hint:
        lines.append(f"hint: {error.hint}")
    return visible(redact_message("\n  ".join(lines)))


if __name__ == "__main__":
    main()
