"""How figures are worded: what is not zero does not look like zero, nor a part like the whole."""

from __future__ import annotations

from fractions import Fraction

import pytest

from shardlab.analysis import Range
from shardlab.report.figures import axes_text, key_text, largest_first, percent, shares, times


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (0.0, "0 %"),
        (0.0009, "<0.1 %"),
        (0.001, "0.1 %"),
        (0.0347, "3.5 %"),
        (0.38, "38 %"),
        (0.996, "99.6 %"),
        (0.9995, ">99.9 %"),
        (1.0, "100 %"),
    ],
)
def test_percent(part: float, text: str) -> None:
    assert percent(part) == text


@pytest.mark.parametrize(
    ("executions", "text"), [((80, 80), "×80"), ((0, 80), "×0–80"), ((3, None), "×3 at least")]
)
def test_times(executions: Range, text: str) -> None:
    assert times(executions) == text


@pytest.mark.parametrize(
    ("axes", "text"), [(("data", "fsdp"), "data+fsdp"), ((), "one device"), (None, "unknown")]
)
def test_axes(axes: tuple[str, ...] | None, text: str) -> None:
    assert axes_text(axes) == text


def test_groups_of_one_are_not_called_none() -> None:
    assert (key_text("none"), key_text("fsdp")) == ("one device", "fsdp")


def test_the_largest_comes_first_by_its_upper_end() -> None:
    sizes = {
        "low": (Fraction(5), Fraction(5)),
        "range": (Fraction(0), Fraction(9)),
        "open": (Fraction(6), None),
    }
    assert [key for key, _ in largest_first(sizes)] == ["range", "open", "low"]


def test_shares_add_up_or_are_not_given() -> None:
    exact = [(Fraction(1), Fraction(1)), (Fraction(3), Fraction(3))]
    assert shares(exact) == ["25 %", "75 %"]
    assert shares([*exact, (Fraction(1), None)]) == ["–"] * 3
    assert shares([(Fraction(0), Fraction(0))]) == ["–"]
