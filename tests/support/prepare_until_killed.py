# SPDX-License-Identifier: Apache-2.0
"""Prepares SOURCE in DIRECTORY with so many WORKERS, in processes that are killed at moments that SEED decides.

Each lives for some rows and some milliseconds; one that ends by itself is the last. Prints, as JSON, how many died and
how many rows each found done. The processes are forks of this one, so that they need not import everything; workers
import this file, so nothing is imported above.
"""

if __name__ == "__main__":
    import json
    import os
    import random
    import signal
    import sys
    import time
    from pathlib import Path

    from preparing import prepare
    from specforge_core.contracts import SilentProgress
    from specforge_core.prompts import prepare as preparation

    preparation.SAVE_SECONDS = 0.0  # after each chunk
    source, directory, workers, most_rows = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    generator = random.Random(int(sys.argv[5]))

    class Spoken(SilentProgress):
        """Says how many rows were done before, and then how many are."""

        def __init__(self, out: int) -> None:
            self._out, self._rows = out, 0

        def advance(self, units: int, **values: float) -> None:
            self._rows += units
            os.write(self._out, f"{self._rows}\n".encode())

    found, deaths = [], 0
    while True:
        into, out = os.pipe()
        pid = os.fork()
        if pid == 0:
            prepare([source], directory, workers=workers, progress=Spoken(out))
            os._exit(0)
        os.close(out)
        with open(into, encoding="utf-8") as said:
            begun = said.readline()
            if not begun:  # the one before was killed when all was done
                break
            found.append(int(begun))
            enough = found[-1] + generator.choice([0, most_rows // 2, most_rows])
            while (line := said.readline()) and int(line) < enough:
                pass
            time.sleep(generator.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
        if os.waitpid(pid, 0)[1] == 0:
            break
        deaths += 1
    print(json.dumps({"deaths": deaths, "found": found}))
