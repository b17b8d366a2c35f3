from fractions import Fraction

import pytest

from shardlab.units import format_bytes, format_count, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param(0, "0 B", id="zero"),
        pytest.param(40, "40 B", id="small-is-exact"),
        pytest.param(999, "999 B", id="below-the-prefix"),
        pytest.param(1000, "1 kB", id="exact-prefix-is-short"),
        pytest.param(1001, "1.00 kB", id="rounded-keeps-its-zeros"),
        pytest.param(1500, "1.5 kB", id="exact-fraction"),
        pytest.param(57_802_752, "57.8 MB", id="three-digits"),
        pytest.param(999_999, "1.00 MB", id="rounding-moves-to-the-next-prefix"),
        pytest.param(9_996_000, "10.0 MB", id="rounding-adds-a-digit"),
        pytest.param(99_000_000_000, "99 GB", id="giga"),
        pytest.param(3 * 10**12, "3 TB", id="tera"),
        pytest.param(Fraction(16384, 3), "5.46 kB", id="fraction"),
        pytest.param(Fraction(1, 3), "0.333 B", id="part-of-a-byte-is-not-zero"),
        pytest.param(Fraction(1, 10**15), "1e-15 B", id="tiny-is-not-zero"),
        pytest.param(-2_500_000, "-2.5 MB", id="difference"),
        pytest.param(None, "unknown", id="unknown"),
        pytest.param(float("inf"), "unknown", id="infinite"),
        pytest.param((5, 5), "5 B", id="exact-range"),
        pytest.param((1000, 2_500_000), "1 kB – 2.5 MB", id="range"),
        pytest.param((0, 40), "0 B – 40 B", id="range-from-zero"),
        pytest.param((1000, None), "at least 1 kB", id="open-range"),
        pytest.param((0, None), "unknown", id="nothing-known"),
    ],
)
def test_format_bytes(value, text):
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (3e-6, "3.00 µs"),  # the float is not exactly 3/10^6: rounded, so it keeps its zeros
        (Fraction(3, 10**6), "3 µs"),
        (0.0125, "12.5 ms"),
        (0.9996, "1.00 s"),
        (1.5, "1.5 s"),
        (90, "90 s"),
        (1230, "20.5 min"),
        (9000, "2.5 h"),
        (4e-10, "4e-10 s"),
        (None, "unknown"),
    ],
)
def test_format_seconds(value, text):
    assert format_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (220_000_000_000_000, "220 TFLOP"),
        (2.2e14, "220 TFLOP"),
        (12_345, "12.3 kFLOP"),
        (None, "unknown"),
        ((1, None), "at least 1 FLOP"),
    ],
)
def test_format_count(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20 GB", 20_000_000_000),
        ("1.5GiB", 3 << 29),
        ("512 MiB", 512 << 20),
        ("40", 40),
        ("40 B", 40),
        ("0.1 kB", 100),
        (" 1,000 kb ", 1_000_000),
    ],
)
def test_parse_bytes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    "text", ["", "GB", "-1 GB", "20 Gbit", "1e9", "0.5 B", "٣ GB", "9" * 100, "20 GB per s"]
)
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match=r"bytes"):
        parse_bytes(text)
