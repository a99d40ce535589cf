"""Tests of cbtfs.readahead: who reads in order, and what to fetch ahead of them."""

import random

import pytest
from hypothesis import given, strategies as st

from cbtfs import readahead, units
from cbtfs.extents import Extent
from cbtfs.readahead import FIRST, MOST, SLACK, STREAMS, Streams

KiB, MiB, GiB = units.KiB, units.MiB, units.GiB
STEP = 128 * KiB


def note(streams: Streams, start: int, length: int = STEP) -> Extent:
    """Take a read, and have fetched what is due."""
    stream, due = streams.note(start, start + length)
    streams.fetched(stream, due.stop)
    return due


def test_a_read_somewhere_fetches_nothing_ahead() -> None:
    assert note(Streams(GiB), 100 * MiB).length == 0


def test_the_read_after_it_does() -> None:
    streams = Streams(GiB)
    note(streams, 100 * MiB)

    due = note(streams, 100 * MiB + STEP)

    assert due == Extent(100 * MiB + 2 * STEP, 100 * MiB + 2 * STEP + FIRST)


def test_a_read_from_the_beginning_is_taken_for_the_beginning_of_a_stream() -> None:
    assert note(Streams(GiB), 0) == Extent(STEP, STEP + FIRST)


def test_the_window_doubles_up_to_its_most() -> None:
    streams, ahead = Streams(GiB), 0
    for start in range(0, 200 * MiB, STEP):
        ahead = max(ahead, note(streams, start).stop)
        assert ahead <= start + STEP + MOST

    assert ahead >= 200 * MiB + MOST // 2


def test_it_is_topped_up_in_good_size() -> None:
    streams = Streams(GiB)
    due = [note(streams, start) for start in range(0, 200 * MiB, STEP)]

    sizes = [extent.length for extent in due if extent.length]
    assert min(sizes[8:]) >= MOST // 2


def test_nothing_is_fetched_beyond_the_end() -> None:
    streams = Streams(3 * MiB + 5)
    stops = [note(streams, start).stop for start in range(0, 3 * MiB, STEP)]

    assert max(stops) == 3 * MiB + 5


def test_requests_that_overtake_one_another_are_one_stream() -> None:
    streams, ahead = Streams(GiB), 0
    starts = list(range(0, 64 * MiB, STEP))
    rng = random.Random(1)
    for at in range(0, len(starts), 8):
        for start in rng.sample(starts[at : at + 8], 8):
            ahead = max(ahead, note(streams, start).stop)

    assert ahead >= 64 * MiB + MOST // 2
    assert len(streams._streams) <= 8


def test_several_readers_of_one_file_have_a_stream_each() -> None:
    streams = Streams(GiB)
    ahead = [0, 0, 0, 0]
    for step in range(0, 32 * MiB, STEP):
        for reader in range(4):
            ahead[reader] = max(ahead[reader], note(streams, reader * 256 * MiB + step).stop)

    assert all(stop >= at * 256 * MiB + 40 * MiB for at, stop in enumerate(ahead))


def test_what_could_not_be_fetched_is_asked_for_again() -> None:
    streams = Streams(GiB)
    stream, due = streams.note(0, STEP)
    streams.fetched(stream, due.start + 1)

    _, again = streams.note(STEP, 2 * STEP)

    assert again.start == max(due.start + 1, 2 * STEP)
    assert again.length > 0


def test_going_back_begins_another_stream() -> None:
    streams = Streams(GiB)
    for start in range(500 * MiB, 520 * MiB, STEP):
        note(streams, start)

    assert note(streams, 100 * MiB).length == 0
    assert note(streams, 100 * MiB + STEP).length == FIRST


def test_streams_are_forgotten() -> None:
    streams = Streams(GiB)
    for number in range(10 * STREAMS):
        note(streams, number * 2 * (SLACK + MiB) % GiB)

    assert len(streams._streams) <= STREAMS


@given(st.lists(st.tuples(st.integers(0, 64), st.integers(1, 16)), max_size=60))
def test_random_reads_stay_within_file_and_window(reads: list[tuple[int, int]]) -> None:
    size = 64 * MiB + 3
    streams = Streams(size, most=8 * MiB)
    for position, length in reads:
        start = position * MiB
        stop = min(start + length * 64 * KiB, size)
        if start < stop:
            stream, due = streams.note(start, stop)
            assert due.start <= due.stop <= size
            assert due.length <= 8 * MiB
            assert due.stop <= max(stream.next + 8 * MiB, due.start)
            streams.fetched(stream, due.stop)


@pytest.mark.parametrize("first", [FIRST, readahead.MOST])
def test_windows_are_whole_requests(first: int) -> None:
    assert first % MiB == 0
