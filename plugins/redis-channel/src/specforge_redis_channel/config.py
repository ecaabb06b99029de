# SPDX-License-Identifier: Apache-2.0
"""The ``channel: {name: redis}`` section. Read by ``specforge plan``, so it imports no client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, PlainSerializer, field_validator
from specforge_core import RefChannelConfig

_SCHEMES = ("redis", "rediss", "unix")


def without_secrets(url: str) -> str:
    """The URL as it may be shown: without user, password and options, any of which can be secret."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class RedisChannelConfig(RefChannelConfig):
    """Refs over Redis Streams."""

    url: Annotated[str, PlainSerializer(without_secrets)] = Field(
        "redis://127.0.0.1:6379/0",
        repr=False,
        description="redis://, rediss:// (TLS) or unix://; with [user:password@], database, and options after '?'",
    )
    lease_seconds: float = Field(
        30.0, ge=1, description="a process silent for longer is taken for dead: what it leased goes to others"
    )
    reconnect_seconds: float = Field(60.0, ge=0, description="how long a lost connection is tried again")

    def widens_trust(self) -> Mapping[str, str]:
        return {"url": f"connect to {without_secrets(self.url)}"}

    @field_validator("url")
    @classmethod
    def _usable(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ValueError("the URL's address cannot be read: is a special character not percent-encoded?") from None
        if parts.scheme not in _SCHEMES:
            raise ValueError(f"the URL must begin with one of {', '.join(f'{name}://' for name in _SCHEMES)}")
        if parts.scheme == "unix" and not parts.path:
            raise ValueError("the URL names no socket: unix:///run/redis/redis.sock")
        if parts.scheme != "unix" and not parts.hostname:
            raise ValueError("the URL names no host")
        if port == 0:
            raise ValueError("port 0 is none that a server listens on")
        return url
