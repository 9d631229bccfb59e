import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.units import format_bytes, format_seconds, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [
        (0, 0),
        (4096, 4096),
        ("12B", 12),
        ("3KB", 3_000),
        ("3KiB", 3_072),
        ("5 MB", 5_000_000),
        (" 1.5MiB ", 1_572_864),
        ("2GB", 2_000_000_000),
        ("8GiB", 8_589_934_592),
        ("1.5TiB", 1_649_267_441_664),
        ("2 TB", 2_000_000_000_000),
        (".5KiB", 512),
        ("0.3B", 0),
        ("9007199254740993B", 9_007_199_254_740_993),
    ],
)
def test_sizes_are_read_to_the_byte(written: str | int, size_bytes: int) -> None:
    assert parse_bytes(written) == size_bytes


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (0, 0.0),
        (2, 2.0),
        (0.1, 0.1),
        ("0.1s", 0.1),
        ("500ms", 0.5),
        ("7us", 7e-6),
        ("30s", 30.0),
        ("2m", 120.0),
        ("1.5 h", 5400.0),
    ],
)
def test_durations_are_read_exactly(written: str | float, seconds: float) -> None:
    assert parse_seconds(written) == seconds


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        (-1, "found -1, a negative size"),
        ("-1GiB", "found '-1GiB', a negative size"),
        (1.5, r"found 1\.5 \(float\)"),
        (True, r"found True \(bool\)"),
        (None, r"found None \(NoneType\)"),
        ("8", "found '8' without a unit"),
        ("1.5", r"found '1\.5' without a unit"),
        ("8G", "unknown unit 'G'.*did you mean GiB?"),
        ("8gb", "unknown unit 'gb'.*did you mean GB?"),
        ("8 parsec", "unknown unit 'parsec'"),
        ("much", "found 'much', which is not a size"),
        ("", "found '', which is not a size"),
        ("1e9B", "which is not a size"),
        ("GiB" * 100, r"which is not a size"),
    ],
)
def test_a_wrong_size_is_refused_in_words(written: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as refusal:
        parse_bytes(written)  # type: ignore[arg-type]
    assert "expected a number of bytes or a size such as 8GiB" in str(refusal.value)
    assert len(str(refusal.value)) < 250


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        (-1, "found -1, a negative duration"),
        ("-5ms", "found '-5ms', a negative duration"),
        (float("nan"), "found nan, which is not finite"),
        (float("inf"), "found inf, which is not finite"),
        ("9" * 400 + "s", "which is not finite"),
        (False, r"found False \(bool\)"),
        ([], r"found \[\] \(list\)"),
        ("500", "found '500' without a unit"),
        ("500MS", "unknown unit 'MS'.*did you mean ms?"),
        ("5 sec", "unknown unit 'sec'.*did you mean s?"),
        ("5 GiB", "unknown unit 'GiB'"),
        ("1e-3s", "which is not a duration"),
        ("soon", "found 'soon', which is not a duration"),
    ],
)
def test_a_wrong_duration_is_refused_in_words(written: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as refusal:
        parse_seconds(written)  # type: ignore[arg-type]
    assert "expected a number of seconds or a duration such as 500ms" in str(refusal.value)
    assert len(str(refusal.value)) < 250


@pytest.mark.parametrize(
    ("size_bytes", "written"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1KiB"),
        (8 << 30, "8GiB"),
        (3 << 19, "1.5MiB"),
        (5 << 40, "5TiB"),
        (5000 << 40, "5000TiB"),
    ],
)
def test_sizes_are_written_in_the_largest_unit_that_fits(size_bytes: int, written: str) -> None:
    assert format_bytes(size_bytes) == written


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.0, "0s"),
        (1e-6, "1us"),
        (0.00015, "150us"),
        (0.0009999999, "1ms"),
        (0.5, "500ms"),
        (0.9999999, "1s"),
        (1.25, "1.25s"),
        (119.0, "119s"),
        (120.0, "2m"),
        (-0.002, "-2ms"),
    ],
)
def test_durations_are_written_as_people_say_them(seconds: float, written: str) -> None:
    assert format_seconds(seconds) == written


@given(st.integers(min_value=0, max_value=1 << 50))
def test_a_written_size_reads_back_to_the_printed_precision(size_bytes: int) -> None:
    assert parse_bytes(format_bytes(size_bytes)) == pytest.approx(size_bytes, rel=0.006, abs=1)


@given(st.floats(min_value=1e-5, max_value=1e6))
def test_a_written_duration_reads_back_to_the_printed_precision(seconds: float) -> None:
    assert parse_seconds(format_seconds(seconds)) == pytest.approx(seconds, rel=0.006)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused_and_never_crashes(text: str) -> None:
    for parse in (parse_bytes, parse_seconds):
        complaint = ""
        try:
            assert parse(text) >= 0
        except ValueError as refusal:
            complaint = str(refusal)
        assert not complaint or "expected" in complaint
