# SPDX-License-Identifier: Apache-2.0
"""The mechanism under every contract suite: kit tests that no subclass can weaken, and a runner for negative controls.

A suite is a class of kit tests over an overridable factory. A plugin author subclasses it, provides the factory and
gets every test. A suite is only worth something if it rejects what is broken, so each comes with *negative controls*:
deliberately broken implementations that :func:`assert_rejected` expects a named kit test to refuse.

This package is the only place in core that imports pytest (``pip install specforge-core[testing]``).
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest


class ContractSuite:
    """Base of the contract suites. A kit test may be overridden only by one marked ``xfail(reason=…)``."""

    thorough: ClassVar[frozenset[str]] = frozenset()
    """Kit tests that are not of the quick part, which ``specforge plugins check`` runs."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, owner in _kit_tests(cls):
            _refuse_weakening(cls, name, owner)


def _kit_tests(suite: type[ContractSuite]) -> Iterator[tuple[str, type]]:
    """Every test name that an ancestor of ``suite`` defines, and that ancestor."""
    for owner in suite.__mro__[1:]:
        if issubclass(owner, ContractSuite):
            yield from ((name, owner) for name in vars(owner) if name.startswith("test_"))


def _refuse_weakening(suite: type[ContractSuite], name: str, owner: type) -> None:
    """:raises TypeError: ``suite`` replaces or removes ``owner``'s test without saying why."""
    found = inspect.getattr_static(suite, name)
    if found is vars(owner)[name] or _expected_to_fail(found):
        return
    what = "removes" if found is None else "overrides"
    raise TypeError(
        f"{suite.__name__} {what} {owner.__name__}.{name}, a test of the contract; "
        'what cannot pass it overrides it marked @pytest.mark.xfail(reason="…")'
    )


def _expected_to_fail(test: object) -> bool:
    marks: list[pytest.Mark] = getattr(test, "pytestmark", [])
    return any(mark.name == "xfail" and str(mark.kwargs.get("reason", "")).strip() for mark in marks)


@dataclass(frozen=True)
class SuiteReport:
    """How each kit test of one suite class ended.

    :param failed: test name → what it said. A test that never began (its fixtures failed) is in ``errors`` instead.
    """

    passed: frozenset[str]
    skipped: frozenset[str]
    failed: Mapping[str, str]
    errors: Mapping[str, str]

    @property
    def ok(self) -> bool:
        return not self.failed and not self.errors


def run_suite(suite: type[ContractSuite], *, only: str = "", quick: bool = False) -> SuiteReport:
    """Run a suite class in this process, apart from any pytest session that is going on.

    :param only: run just the kit test of this name.
    :param quick: leave out the suite's ``thorough`` tests.
    :raises ValueError: the suite has no such test, or no test at all.
    """
    names = {name for name, _ in _kit_tests(suite)} | {name for name in vars(suite) if name.startswith("test_")}
    if not names or (only and only not in names):
        raise ValueError(f"{suite.__name__} has no test {only or 'at all'}")
    recorder = _Recorder(suite, {only} if only else names - suite.thorough if quick else names)
    with tempfile.TemporaryDirectory(prefix="suite-") as directory:
        silent = [f"-pno:{plugin}" for plugin in ("terminal", "cacheprovider", "faulthandler", "logging", "timeout")]
        place = ["-c", os.devnull, "--rootdir", directory, "--basetemp", str(Path(directory) / "tmp"), "--noconftest"]
        code = pytest.main([*silent, "-s", *place, inspect.getfile(ContractSuite)], plugins=[recorder])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"{suite.__name__} could not be run: pytest ended with {code!r}")
    return recorder.report()


def assert_rejected(suite: type[ContractSuite], *, by: str) -> None:
    """A negative control: the kit test ``by`` must fail on this suite's broken implementation.

    :raises AssertionError: the test passed, was skipped, or could not even begin.
    """
    report = run_suite(suite, only=by)
    if by not in report.failed:
        ended = f"did not begin: {report.errors[by]}" if by in report.errors else "did not fail"
        raise AssertionError(f"{suite.__name__} is broken on purpose, but {by} {ended}")


class _Recorder:
    """A pytest plugin that offers one class for collection and keeps how its tests ended."""

    def __init__(self, suite: type[ContractSuite], chosen: Collection[str]) -> None:
        self._suite = suite
        self._chosen = chosen
        self._ended: dict[str, set[str]] = {}
        self._said: dict[str, str] = {}

    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> pytest.Module:
        module = _SuiteModule.from_parent(parent, path=file_path)
        module.suite = self._suite
        return module

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if _test_name(item.nodeid) in self._chosen]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            raise RuntimeError(f"{self._suite.__name__} cannot be collected: {report.longreprtext}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = _test_name(report.nodeid)
        ended = self._ended.setdefault(name, set())
        if report.failed:
            ended.add("failed" if report.when == "call" else "error")
            self._said.setdefault(name, report.longreprtext)
        elif report.skipped or report.when == "call":
            ended.add(report.outcome)

    def report(self) -> SuiteReport:
        def said(outcome: str) -> dict[str, str]:
            return {name: self._said[name] for name, ended in self._ended.items() if outcome in ended}

        return SuiteReport(
            passed=frozenset(name for name, ended in self._ended.items() if ended == {"passed"}),
            skipped=frozenset(name for name, ended in self._ended.items() if ended == {"skipped"}),
            failed=said("failed"),
            errors=said("error"),
        )


class _SuiteModule(pytest.Module):
    """A module that holds nothing but the suite class, under a name that pytest collects."""

    suite: type[ContractSuite]

    def _getobj(self) -> ModuleType:
        module = ModuleType("contract_suite")
        vars(module)["TestSuite"] = self.suite
        return module


def _test_name(nodeid: str) -> str:
    return nodeid.rpartition("::")[2].partition("[")[0]
