import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ncclbench.errors import UsageError
from ncclbench.units import counted, format_bytes, format_seconds, format_size, parse_size

SCALES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
sizes = st.integers(1, 2**62 - 1)


@given(sizes)
@example(2**62 - 1)
@example(2**40)
def test_every_size_is_read_back_from_what_is_printed(nbytes: int) -> None:
    assert parse_size(format_size(nbytes)) == nbytes


@given(sizes)
def test_whole_number_is_its_own_size(nbytes: int) -> None:
    assert parse_size(nbytes) == parse_size(str(nbytes)) == nbytes


@pytest.mark.parametrize("suffix", SCALES)
@pytest.mark.parametrize("unit", ["", "B", "iB"])
@given(number=st.integers(1, 2**20))
def test_suffixes_are_powers_of_two_in_either_case(suffix: str, unit: str, number: int) -> None:
    text = f"{number}{suffix}{unit if suffix else unit[-1:]}"
    for spelling in (text, text.lower(), text.upper(), f" {number} {text[len(str(number)) :]} "):
        assert parse_size(spelling) == number * SCALES[suffix]


@given(quarters=st.integers(1, 2**40), suffix=st.sampled_from("KMGT"))
def test_fractions_count_when_they_make_whole_bytes(quarters: int, suffix: str) -> None:
    whole, rest = divmod(quarters, 4)
    nbytes = quarters * SCALES[suffix] // 4
    assert nbytes >= 2**62 or parse_size(f"{whole}.{rest * 25:02d}{suffix}") == nbytes


def test_a_long_fraction_is_not_rounded_to_another_size() -> None:
    assert parse_size("9007199254740993.0") == 9007199254740993


@pytest.mark.parametrize("text", ["1.5", "0.3K", "1.00000000000000000001K"])
def test_a_part_of_a_byte_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="whole number of bytes"):
        parse_size(text)


@pytest.mark.parametrize(
    "text",
    [
        *["", " ", "-1", "-1K", "+1", "0", "0K", "0.0", "nan", "inf", "-inf", "Infinity", "one", "0x10"],
        *["K", "B", ".", "1.", "1X", "1KK", "1K1", "1K 2K", "1\n2", "1e6", "1,000", "1_000"],
    ],
)
def test_what_is_no_positive_size_is_refused_and_named(text: str) -> None:
    with pytest.raises(UsageError, match="--min-bytes must be a positive size") as raised:
        parse_size(text, "--min-bytes")
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize("number", [0, -1, -(2**70), True, False])
def test_numbers_and_booleans_that_are_no_size_are_refused(number: int) -> None:
    with pytest.raises(UsageError, match="positive size"):
        parse_size(number)


@pytest.mark.parametrize(
    "text",
    [str(2**62), "4194304T", "99999999T", "9" * 400, "9" * 400 + ".0", "9" * 5000, "1" * 400 + ".5K"],
    ids=lambda text: f"{len(text)} characters from {text[:8]}",
)
def test_size_beyond_any_memory_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@given(st.text(max_size=12))
@example("\N{ARABIC-INDIC DIGIT ONE}K")
def test_text_is_a_positive_size_or_a_usage_error(text: str) -> None:
    try:
        nbytes = parse_size(text)
    except UsageError:
        return
    assert type(nbytes) is int
    assert 0 < nbytes < 2**62


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (1, "1"),
        (1000, "1000"),
        (1024, "1K"),
        (1536, "1536"),
        (3 << 20, "3M"),
        (1 << 30, "1G"),
        (5 << 40, "5T"),
        (0, "0"),
    ],
)
def test_a_size_is_printed_with_the_largest_exact_suffix(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        *[(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB")],
        *[(1 << 30, "1.0 GiB"), (1 << 40, "1.0 TiB"), (1 << 51, "2048.0 TiB")],
        # Rounded to four digits these would be 1024.0 of the unit below.
        *[((1 << 20) - 1, "1.0 MiB"), ((1 << 30) - 1, "1.0 GiB"), ((1 << 40) - 1, "1.0 TiB")],
    ],
)
def test_bytes_are_printed_in_the_unit_that_fits(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@given(st.integers(0, 2**60))
def test_printed_bytes_are_exact_to_the_last_digit(nbytes: int) -> None:
    number, unit = format_bytes(nbytes).split()
    scale = SCALES[unit[0] if unit != "B" else ""]
    assert abs(float(number) - nbytes / scale) <= (0.05000001 if scale > 1 else 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(0.0, "0.0 s"), (0.44, "0.4 s"), (12.2, "12 s"), (59.4, "59 s"), (59.6, "1 min 00 s")],
        *[(185.0, "3 min 05 s"), (3599.7, "1 h 00 min"), (7800.0, "2 h 10 min"), (90000.0, "25 h 00 min")],
    ],
)
def test_durations_are_printed_for_a_reader(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_count_has_its_noun_in_the_right_number() -> None:
    assert [counted(n, "rank") for n in (0, 1, 2, None)] == ["0 ranks", "1 rank", "2 ranks", "? ranks"]
    assert (counted(1, "leaf"), counted(2, "leaf")) == ("1 leaf", "2 leaves")
    assert (counted(1, "required entry"), counted(3, "required entry")) == ("1 required entry", "3 required entries")
    assert counted(2, "process start") == "2 process starts"
