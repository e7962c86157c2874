"""What an error holds and how it is told: what, and the way out, apart from each other."""

from __future__ import annotations

import pickle

import pytest

from rats.schemas.errors import ConfigError, DataError, RetryLaterError, one_line, reason, remedy


def test_a_caller_names_the_way_out_that_a_reader_does_not_know() -> None:
    with pytest.raises(DataError) as caught, remedy("make it again"):
        raise DataError("a.tar is cut; 3 of 7 bytes are there")
    assert str(caught.value) == "a.tar is cut; 3 of 7 bytes are there; make it again"
    assert (caught.value.what, caught.value.remedy) == ("a.tar is cut; 3 of 7 bytes are there", "make it again")


def test_the_innermost_way_out_counts_and_the_raiser_s_own_most_of_all() -> None:
    @remedy("outer")
    @remedy("inner")
    def fail(own: str) -> None:
        raise DataError("b.json is damaged", own)

    for own, told in (("", "b.json is damaged; inner"), ("own", "b.json is damaged; own")):
        with pytest.raises(DataError, match=f"^{told}$"):
            fail(own)


def test_a_wrong_setting_is_no_damage_and_stays_as_it_is() -> None:
    with pytest.raises(ConfigError, match="^RATS_X is 'y': give a number$"), remedy("make it again"):
        raise ConfigError("RATS_X is 'y': give a number")


def test_another_way_out_takes_the_place_of_the_first_and_the_kind_stays() -> None:
    error = RetryLaterError("c; d", "come back").with_remedy("fetch it; nothing was written")
    assert isinstance(error, RetryLaterError) and str(error) == "c; d; fetch it; nothing was written"


def test_an_error_comes_whole_from_another_process() -> None:
    error = DataError("e is missing")
    error.remedy = "make it"
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.what, copy.remedy, str(copy)) == (DataError, "e is missing", "make it", str(error))


def test_what_an_exception_says_is_one_line_and_cut() -> None:
    assert reason(ValueError("two\n  lines\tof it")) == "two lines of it"
    assert reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("x" * 999))) == 200 and len(reason(ValueError("x" * 999), 23)) == 23
    assert one_line(ValueError("a\nb")) == "ValueError: a b"
