# SPDX-License-Identifier: Apache-2.0
"""Prepares SOURCE in DIRECTORY with so many WORKERS, in processes that are killed after at most SECONDS, SEED decides.

A process that ends by itself is the last. Prints, as JSON, how many died and how many rows each found done. The
processes are forks of this one, so that they need not import everything; workers import this file, so nothing is
imported above.
"""

if __name__ == "__main__":
    import json
    import os
    import random
    import signal
    import sys
    import time
    from pathlib import Path

    from preparing import FirstAdvance, prepare
    from specforge_core.prompts import prepare as preparation

    preparation.SAVE_SECONDS = 0.005
    source, directory, workers, seconds, seed = Path(sys.argv[1]), Path(sys.argv[2]), *map(float, sys.argv[3:])
    generator = random.Random(seed)

    def prepare_in_a_fork(out: int) -> None:
        class Spoken(FirstAdvance):
            """Says what was done, and so that it begins."""

            def advance(self, units: int, **values: float) -> None:
                if self.rows < 0:
                    os.write(out, f"{units}\n".encode())
                super().advance(units, **values)

        prepare([source], directory, workers=int(workers), progress=Spoken())
        os._exit(0)

    found, deaths = [], 0
    while True:
        into, out = os.pipe()
        pid = os.fork()
        if pid == 0:
            prepare_in_a_fork(out)
        os.close(out)
        with open(into, encoding="utf-8") as begun:
            found.append(int(begun.readline()))
            time.sleep(generator.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        if os.waitpid(pid, 0)[1] == 0:
            break
        deaths += 1
    print(json.dumps({"deaths": deaths, "found": found}))
