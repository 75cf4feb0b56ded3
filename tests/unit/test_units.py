import pytest

from megatrain.units import format_bytes, format_count, format_duration


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (27_123_456, "27.1M"), (8.03e9, "8.03B"), (9_996, "10.0k"), (4e14, "400T")],
)
def test_counts_have_three_digits(number, text):
    assert format_count(number) == text


@pytest.mark.parametrize(("size", "text"), [(512, "512 B"), (1 << 30, "1.07 GB"), (80 * 10**9, "80.0 GB")])
def test_bytes_have_three_digits_and_a_decimal_unit(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.6, "1m 00s"), (750, "12m 30s"), (7500, "2h 05m"), (273600, "3d 4h"), (float("nan"), "unknown")],
)
def test_durations_have_two_units(seconds, text):
    assert format_duration(seconds) == text
