# SPDX-License-Identifier: Apache-2.0
"""Options of the random conversations."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("prompts", "tests/prompts; `make prompts` is its long version")
    group.addoption("--talks", type=int, default=720, help="random conversations, over all templates together")
    group.addoption("--talks-seed", type=int, default=7)
    group.addoption("--talks-only", type=int, help="the number of one conversation, as a failure names it")
