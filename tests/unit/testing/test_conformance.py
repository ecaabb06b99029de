# SPDX-License-Identifier: Apache-2.0
"""Contract suites: subclasses cannot weaken them, and negative controls are really run."""

from __future__ import annotations

from pathlib import Path

import pytest
from specforge_core.testing.conformance import ContractSuite, assert_rejected, run_suite


class NumberSuite(ContractSuite):
    def make_number(self) -> int:
        raise NotImplementedError

    @pytest.fixture
    def number(self) -> int:
        return self.make_number()

    def test_is_positive(self, number: int) -> None:
        assert number > 0

    @pytest.mark.parametrize("divisor", [2, 3])
    def test_divides(self, number: int, divisor: int, tmp_path: Path) -> None:
        assert tmp_path.is_dir()
        assert number % divisor == 0


class TestSix(NumberSuite):
    def make_number(self) -> int:
        return 6


class FourSuite(NumberSuite):
    def make_number(self) -> int:
        return 4


def test_a_good_implementation_passes_every_kit_test() -> None:
    report = run_suite(TestSix)
    assert report.ok
    assert report.passed == {"test_is_positive", "test_divides"}


def test_a_broken_one_is_rejected_by_the_named_test() -> None:
    assert_rejected(FourSuite, by="test_divides")
    assert set(run_suite(FourSuite).failed) == {"test_divides"}


def test_a_control_that_is_not_rejected_is_an_error() -> None:
    with pytest.raises(AssertionError, match="test_is_positive did not fail"):
        assert_rejected(FourSuite, by="test_is_positive")


def test_a_control_that_fails_before_the_test_proves_nothing() -> None:
    class NoFactorySuite(NumberSuite):
        pass

    with pytest.raises(AssertionError, match="did not begin"):
        assert_rejected(NoFactorySuite, by="test_is_positive")


def test_an_unknown_test_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="test_nothing"):
        assert_rejected(FourSuite, by="test_nothing")


def test_a_local_class_and_its_own_tests_run_too() -> None:
    class OwnSuite(FourSuite):
        def test_own(self, number: int) -> None:
            assert number == 4

    assert "test_own" in run_suite(OwnSuite).passed


def test_a_kit_test_cannot_be_overridden() -> None:
    with pytest.raises(TypeError, match=r"overrides NumberSuite\.test_divides"):

        class Weak(FourSuite):
            def test_divides(self) -> None:
                pass


def test_nor_removed() -> None:
    with pytest.raises(TypeError, match="removes"):

        class Weak(FourSuite):
            test_divides = None


def test_nor_hidden_by_a_mixin() -> None:
    class Mixin:
        def test_divides(self) -> None:
            pass

    with pytest.raises(TypeError, match="test_divides"):

        class Weak(Mixin, FourSuite):
            pass


@pytest.mark.parametrize("reason", ["", "  "])
def test_xfail_needs_a_reason(reason: str) -> None:
    with pytest.raises(TypeError):

        class Weak(FourSuite):
            @pytest.mark.xfail(reason=reason)
            def test_divides(self) -> None:
                pass


def test_xfail_with_a_reason_is_allowed_and_inherited() -> None:
    class Known(FourSuite):
        @pytest.mark.xfail(reason="four is not divisible by three")
        def test_divides(self, number: int) -> None:
            assert number % 3 == 0

    class Inherits(Known):
        pass

    report = run_suite(Inherits)
    assert report.ok
    assert report.skipped == {"test_divides"}
