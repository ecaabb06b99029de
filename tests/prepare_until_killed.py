# SPDX-License-Identifier: Apache-2.0
"""Prepares SOURCE in DIRECTORY with so many WORKERS, saving every few milliseconds; a test kills it.

It says when it begins and how many rows it found done. Workers import this file, so nothing is imported above.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    from preparing import prepare
    from specforge_core.contracts import SilentProgress
    from specforge_core.prompts import prepare as preparation

    class SpokenProgress(SilentProgress):
        """Prints what the test waits for."""

        said = False

        def begin(self, description: str, total: int | None) -> None:
            print("begin", flush=True)

        def advance(self, units: int, **values: float) -> None:
            if not self.said:
                print(f"done {units}", flush=True)
            self.said = True

    preparation.SAVE_SECONDS = 0.01
    prepare([Path(sys.argv[1])], Path(sys.argv[2]), workers=int(sys.argv[3]), progress=SpokenProgress())
