# SPDX-License-Identifier: Apache-2.0
"""Runs ``specforge regenerate ARGUMENTS`` in forks of this process, one for each line on standard input.

Each fork's process id is printed before it begins, and its exit status after it ended. Forks need not import anything.
"""

if __name__ == "__main__":
    import os
    import sys

    import transformers  # noqa: F401 - imported for the forks
    from specforge_core.cli.main import main

    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            with open("fork.log", "a", encoding="utf-8") as log:
                os.dup2(log.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            main(["regenerate", *sys.argv[1:]])
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
