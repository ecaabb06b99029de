# SPDX-License-Identifier: Apache-2.0
"""A Mooncake master that is killed, stopped or missing, and processes that die with the memory they brought.

Every call ends within its deadline and the library's own limits; what it says is so.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import torch
from mooncake_producer import Producer
from mooncake_service import MooncakeService, fresh_run, mooncake_service, require_mooncake, wait_until
from specforge_core.contracts import AccessDenied, FeatureGone, StoreError
from specforge_core.testing.samples import assert_same, make_sample
from specforge_mooncake_store.connection import IN_PROGRESS

require_mooncake()
torch.set_num_threads(1)

LIMIT_SECONDS = 8.0
"""By how much a call may outlast its deadline: the library's own limits, and a busy machine."""


@pytest.fixture
def service() -> Iterator[MooncakeService]:
    with mooncake_service() as service:
        yield service


@contextmanager
def producing(service: MooncakeService, run: str, **what: int) -> Iterator[Producer]:
    producer = Producer(service.address, run, **what)
    try:
        yield producer
    finally:
        producer.kill()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds


def error_of(call: Any) -> type[Exception]:
    with pytest.raises(StoreError) as caught:
        call()
    return caught.type


def test_a_restarted_master_knows_nothing_and_is_used_again(service: MooncakeService) -> None:
    with closing(service.store("run", token="secret")) as store:
        refs = [store.put(f"p{number}.e0", make_sample(number)) for number in range(3)]
        service.kill()
        service.restart()
        with within(10 + LIMIT_SECONDS):
            again = store.put("p0.e0", make_sample(7))
        assert again.generation > refs[0].generation
        assert_same(store.get(again), make_sample(7))
        for ref in refs[1:]:
            assert error_of(lambda ref=ref: store.get(ref)) is FeatureGone
        assert store.usage().samples == 1
        with pytest.raises(AccessDenied):
            service.store("run", segment_bytes=0)  # the proof went with the master, and was left again
        store.delete(again)
        assert service.keys("/s/") == []


def test_a_dead_master_is_told_in_time_and_frees_nothing_slowly(service: MooncakeService) -> None:
    with closing(service.store("run", deadline_seconds=2)) as store:
        refs = [store.put(f"p{number}.e0", make_sample(number)) for number in range(20)]
        service.kill()
        for call in (lambda: store.get(refs[0]), lambda: store.put("q.e0", make_sample())):
            with within(2 + LIMIT_SECONDS):
                assert error_of(call) is StoreError
        with within(LIMIT_SECONDS):
            for ref in refs[:10]:
                store.delete(ref)
        assert store.usage().samples == 10
        service.restart()
        with within(2 * LIMIT_SECONDS):
            wait_until(lambda: _gone(store, refs[0]))


def _gone(store: Any, ref: Any) -> bool:
    return error_of(lambda: store.get(ref)) is FeatureGone


def test_a_put_whose_end_nobody_confirmed_is_put_again_under_another_name(service: MooncakeService) -> None:
    """A key that was half put answers the next put with success, and stores nothing."""
    with closing(service.store("run")) as store:
        store.put("p.e0", make_sample(0))
        os.kill(service.pid, signal.SIGSTOP)
        resume = threading.Timer(4.0, os.kill, (service.pid, signal.SIGCONT))
        resume.start()
        with within(10 + LIMIT_SECONDS):
            ref = store.put("p.e0", make_sample(1))
        resume.join()
        assert_same(store.get(ref), make_sample(1))
        wait_until(lambda: store._connection.healthy)  # the library looks about once a second
        store.delete(store.put("q.e0", make_sample(2)))  # what could not be removed then is removed with the next calls
        wait_until(lambda: len(service.keys("specforge/run/s/")) == len(ref.features))


def test_what_a_killed_process_brought_is_gone(service: MooncakeService) -> None:
    with closing(service.store("run")) as store, producing(service, "run", count=3) as producer:
        refs = producer.refs()
        for number, ref in enumerate(refs):
            assert_same(store.get(ref), make_sample(number))
        producer.kill()
        with within(10 + LIMIT_SECONDS):  # until the master misses it, its objects "exist"
            assert error_of(lambda: store.get(refs[0])) is FeatureGone
        assert [error_of(lambda ref=ref: store.get(ref)) for ref in refs[1:]] == [FeatureGone] * 2
        again = store.put(refs[0].sample_id, make_sample(0))
        assert again.generation > refs[0].generation
        assert_same(store.get(again), make_sample(0))
        assert len(service.keys("specforge/run/s/")) == len(again.features)


def test_a_short_deadline_does_not_claim_that_a_silent_process_is_gone(service: MooncakeService) -> None:
    with (
        closing(service.store("run", deadline_seconds=0.5)) as store,
        producing(service, "run", count=1, tokens=5000) as producer,
    ):
        [ref] = producer.refs()
        producer.kill()
        with within(0.5 + LIMIT_SECONDS):
            assert error_of(lambda: store.get(ref)) is StoreError


def test_a_stopped_process_is_not_waited_for_beyond_the_deadline(service: MooncakeService) -> None:
    with closing(service.store("run")) as store, producing(service, "run", count=1, tokens=5000) as producer:
        [ref] = producer.refs()
        store.get(ref)  # they know each other: a first handshake is bounded by the library alone, at some 60 s
        producer.stop()
        with within(10 + LIMIT_SECONDS):
            assert error_of(lambda: store.get(ref)) in (FeatureGone, StoreError)


def test_killed_in_the_middle_of_puts_leaves_no_sample_torn(service: MooncakeService) -> None:
    """Its replacement puts the same ids; what was put of the old ones goes."""
    run = fresh_run()
    with closing(service.store(run)) as store, producing(service, run, count=4, tokens=20_000, times=500) as producer:
        refs = [ref for ref in (producer.ref() for _ in range(10)) if ref is not None]
        producer.kill()
        for ref in refs:
            assert issubclass(error_of(lambda ref=ref: store.get(ref)), StoreError)
        new = [store.put(ref.sample_id, make_sample(n, num_tokens=20_000)) for n, ref in enumerate(refs[:4])]
        for number, ref in enumerate(new):
            assert_same(store.get(ref), make_sample(number, num_tokens=20_000))
        wait_until(lambda: len(service.keys(f"specforge/{run}/s/")) == sum(len(ref.features) for ref in new))


KILLED_IN_A_PUT = """
import sys
import torch
from mooncake.store import MooncakeDistributedStore
from specforge_mooncake_store.vendor_environment import limit_waits
limit_waits("127.0.0.1")
client = MooncakeDistributedStore()
assert client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", sys.argv[1]) == 0
tensor = torch.zeros(40 << 20, dtype=torch.uint8)
print("now", flush=True)
client.put_from(sys.argv[2], tensor.data_ptr(), tensor.nbytes)
"""


def half_put(service: MooncakeService, store: Any, key: str) -> None:
    """Leave a key as a process leaves it that is killed in the middle of putting it."""
    for delay in (0.005, 0.01, 0.002, 0.02, 0.003) * 4:
        command = [sys.executable, "-c", KILLED_IN_A_PUT, service.address, key]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
        if store._connection.get_into([key], [torch.empty(8, dtype=torch.uint8)]) == [IN_PROGRESS]:
            return
        store._connection.remove([key])
    pytest.skip("no process was killed in the middle of its put")


def test_a_process_killed_in_the_middle_of_a_put_is_not_waited_for(service: MooncakeService) -> None:
    """Its memory is elsewhere, so what it began stays begun until the master discards that, after half a minute."""
    with closing(service.store("run")) as store:
        half_put(service, store, store._keys.index_key("p.e0"))
        with within(5.0):
            ref = store.put("p.e0", make_sample(0))
            assert_same(store.get(ref), make_sample(0))
            store.delete(ref)
        assert error_of(lambda: store.get(ref)) is FeatureGone


def test_attaching_without_a_master_ends(service: MooncakeService) -> None:
    service.kill()
    with within(1 + LIMIT_SECONDS):
        assert error_of(lambda: service.store("run", deadline_seconds=1)) is StoreError


ENDINGS = {
    "open": "",
    "after the master": "os.kill(int(sys.argv[2]), 9)",
    "closed while others read": """
def read():
    with contextlib.suppress(StoreError):
        while True: store.get(ref)
threads = [threading.Thread(target=read) for _ in range(4)]
[thread.start() for thread in threads]
time.sleep(.3)
store.close()
[thread.join(20) for thread in threads]
for call in (lambda: store.get(ref), store.usage, lambda: store.delete(ref), lambda: store.put("q.e0", make_sample())):
    try: call()
    except StoreError: continue
    raise SystemExit("used after close")
""",
    "while others read": """
def read():
    with contextlib.suppress(StoreError):
        while True: store.get(ref)
[threading.Thread(target=read, daemon=True).start() for _ in range(4)]
time.sleep(.3)
""",
}
PROGRAM = """
import contextlib, os, sys, threading, time
from pathlib import Path
from specforge_core.contracts import PartContext, StoreError
from specforge_core.testing.samples import make_sample
from specforge_mooncake_store.config import MooncakeStoreConfig
from specforge_mooncake_store.store import MooncakeStore
section = MooncakeStoreConfig(name="mooncake", master=sys.argv[1], host="127.0.0.1", segment_bytes=16 << 20)
store = MooncakeStore(section, PartContext(run_id="ending", directory=Path()))
ref = store.put("p.e0", make_sample(0, num_tokens=2000))
"""


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
def test_a_process_ends_without_crash_or_hang(service: MooncakeService, ending: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + ending, service.address, str(service.pid)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
