# SPDX-License-Identifier: Apache-2.0
"""What is secret in ``channel.url`` stays out of messages, whatever the server says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from pydantic import ValidationError
from specforge_core.contracts import SpecForgeError
from specforge_redis_channel.config import RedisChannelConfig
from specforge_redis_channel.connection import RedisConnection

SECRET = "wonderful-secret"
PROOF = "proof-of-the-runs-token"


@pytest.fixture
def parrot() -> Iterator[int]:
    """A server that refuses every command and quotes it; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=repeat, args=(peer,), daemon=True).start()

        def repeat(peer: socket.socket) -> None:
            with peer:
                while said := peer.recv(1 << 16):
                    words = said.decode(errors="replace").split("\r\n")
                    answer = f"-ERR unknown command, with args beginning with: {' '.join(words)}"
                    for _ in range(said.count(b"*")):
                        peer.sendall(answer.encode() + b"\r\n")

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("user", [f":{SECRET}@", f"someone:{SECRET}@", f":{SECRET}%40%2F@", ""])
def test_a_server_that_quotes_what_it_was_sent_tells_nobody(parrot: int, user: str) -> None:
    config = RedisChannelConfig(name="redis", url=f"redis://{user}127.0.0.1:{parrot}/0", reconnect_seconds=0.1)
    connection = RedisConnection(config, base="b", proof=PROOF)
    with pytest.raises(SpecForgeError) as caught:
        connection.call(lambda: connection.execute("GET", PROOF))
    for secret in (SECRET, PROOF, "someone"):
        assert secret not in str(caught.value)


URLS = [
    f"redis://:{SECRET}@127.0.0.1:0/0",
    f"redis://:{SECRET}@127.0.0.1:70000/0",
    f"http://:{SECRET}@h",
    f"redis://:a/{SECRET}@h",
    f"redis://:{SECRET}",
    f"redis://:{SECRET}@",
    f"redis://:{SECRET}@[::1",
    f":{SECRET}@h",
]


@pytest.mark.parametrize("url", URLS)
def test_a_refused_url_is_not_quoted_by_its_section(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RedisChannelConfig(name="redis", url=url)
    assert SECRET not in "".join(detail["msg"] for detail in caught.value.errors())


def test_an_option_that_the_client_refuses_is_not_quoted() -> None:
    config = RedisChannelConfig(name="redis", url=f"redis://h:1/0?password={SECRET}&{SECRET}=x&socket_timeout={SECRET}")
    with pytest.raises(SpecForgeError) as caught:
        RedisConnection(config, base="b", proof="")
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(config)
    assert SECRET not in config.model_dump_json()
