"""Progress: what the views say."""

import io
import json

import msgspec
import pytest
from rich.console import Console

from cbtfs import progress
from cbtfs.catalogue import DiskPoint
from cbtfs.progress import BarProgress, JsonProgress, LineProgress, Progress, SilentProgress

GiB = 1 << 30

DISK = DiskPoint(
    device="xvda",
    file="xvda.raw",
    vdi_uuid="v",
    size=40 * GiB,
    method="incremental",
    reason="changed",
    base="20261121T020000Z",
    bytes_read=2 * GiB,
    bytes_written=int(1.2 * GiB),
    seconds=14.2,
)
HOSTILE = "web\x1b[2J\n\u202eevil[red]/xvda"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def bar(clock: Clock) -> BarProgress:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    return BarProgress(console, clock=clock)


def shown(view: BarProgress) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(view.bars.get_renderable())
    printed = console.file
    assert isinstance(printed, io.StringIO)
    return printed.getvalue()


def test_the_summary_is_one_line() -> None:
    assert (
        progress.summary("web1/xvda", DISK)
        == "web1/xvda  inc  1.2 GiB of 40 GiB in 14 s  (base 20261121T020000Z)"
    )


def test_the_summary_of_a_full_copy_has_its_reason() -> None:
    disk = msgspec.structs.replace(DISK, method="full", reason="first", base="", seconds=62)

    assert (
        progress.summary("web1/xvda", disk)
        == "web1/xvda  full  1.2 GiB of 40 GiB in 1 m 02 s  (first)"
    )


@pytest.mark.parametrize(
    ("changes", "method", "why"),
    [
        ({"method": "compare", "reason": "cbt-off"}, "cmp", "(cbt-off, base 20261121T020000Z)"),
        ({"method": "resume", "resumed": "incremental"}, "res", "(inc, base 20261121T020000Z)"),
        (
            {"method": "resume", "resumed": "full", "reason": "first", "base": ""},
            "res",
            "(full, first)",
        ),
        (
            {"method": "resume", "resumed": "compare", "reason": "moved"},
            "res",
            "(cmp, moved, base 20261121T020000Z)",
        ),
        ({"method": "incremental", "reason": "changed", "base": ""}, "inc", "(changed)"),
    ],
)
def test_the_summary_tells_why_it_was_no_increment(
    changes: dict[str, str], method: str, why: str
) -> None:
    disk = msgspec.structs.replace(DISK, **changes)

    assert progress.summary("a/b", disk) == f"a/b  {method}  1.2 GiB of 40 GiB in 14 s  {why}"


def test_hostile_names_do_not_reach_the_terminal() -> None:
    assert progress.printable(HOSTILE) == "web?[2J??evil[red]/xvda"
    assert progress.summary(HOSTILE, DISK).startswith("web?[2J??evil[red]/xvda  inc")


def test_a_line_comes_every_30_seconds(stream: io.StringIO, clock: Clock) -> None:
    view = LineProgress(stream, clock=clock)
    view.disk_started("web1/xvda", method="full", reason="first", total=40 * GiB)
    for second in range(1, 66):
        clock.now = second
        view.advanced("web1/xvda", read=GiB // 2, written=GiB // 4)

    assert stream.getvalue().splitlines() == [
        "web1/xvda  full  15 GiB of 40 GiB read, 7.5 GiB written, 512 MiB/s, 50 s left",
        "web1/xvda  full  30 GiB of 40 GiB read, 15 GiB written, 512 MiB/s, 20 s left",
    ]


def test_lines_tell_errors_and_messages_at_once(stream: io.StringIO) -> None:
    view = LineProgress(stream)
    view.disk_started("a/xvda", method="full", reason="first", total=1)
    view.disk_finished("a/xvda", None, "no\nspace")
    view.disk_finished("b/xvda", DISK)
    view.message("cleaned\x07 up")

    assert stream.getvalue() == "a/xvda  failed: no?space\ncleaned? up\n"


def test_events_are_json_lines(stream: io.StringIO, clock: Clock) -> None:
    view = JsonProgress(stream, clock=clock)
    view.disk_started(HOSTILE, method="incremental", reason="changed", total=10)
    for clock.now in (0.5, 1.0, 1.5):
        view.advanced(HOSTILE, read=2, written=1)
    view.disk_finished(HOSTILE, DISK)
    view.disk_finished("b/xvda", None, "lost")
    view.message("bye")

    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(e["schema"], e["event"]) for e in events] == [
        (1, "disk_started"),
        (1, "progress"),
        (1, "disk_finished"),
        (1, "disk_failed"),
        (1, "message"),
    ]
    assert events[1] == {
        "schema": 1, "event": "progress", "disk": HOSTILE, "method": "incremental",
        "read": 4, "written": 2, "total": 10, "seconds": 1.0, "rate": 4, "left": 1.5,
    }  # fmt: skip
    assert events[2]["base"] == DISK.base
    assert {"detail", "resumed", "blocks_sampled", "blocks_mismatched"} <= events[2].keys()
    assert events[3]["error"] == "lost"


def test_bars_show_bytes_written_rate_and_time_left(bar: BarProgress, clock: Clock) -> None:
    bar.disk_started("web1/xvda", method="incremental", reason="changed", total=4 * GiB)
    clock.now = 2.0
    bar.advanced("web1/xvda", read=GiB, written=GiB // 2)

    line = shown(bar)
    assert "web1/xvda  inc" in line
    assert "25%" in line
    assert "512 MiB written, 512 MiB/s, 6.0 s left" in line


def test_the_rate_is_that_of_the_last_half_minute(stream: io.StringIO, clock: Clock) -> None:
    view = LineProgress(stream, clock=clock)
    view.disk_started("web1/xvda", method="compare", reason="moved", total=400 * GiB)
    for second in range(1, 121):
        clock.now = second
        view.advanced("web1/xvda", read=GiB if second <= 60 else GiB // 4, written=0)

    *_, fast, _, slow = stream.getvalue().splitlines()
    assert "60 GiB of 400 GiB read, 0 B written, 1 GiB/s, 5 m 40 s left" in fast
    assert "75 GiB of 400 GiB read, 0 B written, 256 MiB/s, 21 m 40 s left" in slow


def test_nothing_is_said_of_the_time_left_while_nobody_knows(
    stream: io.StringIO, clock: Clock
) -> None:
    view = LineProgress(stream, every=0, clock=clock)
    view.disk_started("a/xvda", method="full", reason="first", total=GiB)
    view.advanced("a/xvda", read=0, written=0)

    assert stream.getvalue() == "a/xvda  full  0 B of 1 GiB read, 0 B written, 0 B/s\n"


def test_a_disk_that_begins_anew_has_one_bar(bar: BarProgress, clock: Clock) -> None:
    bar.disk_started("a/xvda", method="incremental", reason="changed", total=GiB)
    bar.disk_started("a/xvda", method="compare", reason="cbt-mismatch", total=GiB)

    assert shown(bar).count("a/xvda") == 1
    assert "a/xvda  cmp" in shown(bar)
    bar.disk_finished("a/xvda", DISK)
    assert "a/xvda" not in shown(bar)


def test_a_finished_disk_has_no_bar(bar: BarProgress) -> None:
    bar.disk_started("a/xvda", method="full", reason="first", total=1)
    bar.disk_finished("a/xvda", DISK)

    assert "a/xvda" not in shown(bar)


def test_bars_show_hostile_names_as_text(bar: BarProgress) -> None:
    bar.disk_started(HOSTILE, method="full", reason="[bold]", total=1)
    bar.disk_finished("[/]", None, "[/] \x1b")

    assert "web?[2J??evil[red]/xvda  full" in shown(bar)
    assert "([bold])" in shown(bar)


def test_a_disk_nobody_announced_is_no_reason_to_fail(
    bar: BarProgress, stream: io.StringIO
) -> None:
    views: list[Progress] = [bar, LineProgress(stream), SilentProgress()]
    for view in views:
        view.advanced("?", read=1, written=1)
        view.disk_finished("?", DISK)


def test_a_reader_that_goes_away_does_not_stop_the_run(clock: Clock) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    for view in (LineProgress(Gone(), clock=clock), JsonProgress(Gone(), clock=clock)):
        view.message("hello")
    closed = io.StringIO()
    closed.close()
    LineProgress(closed).message("hello")


@pytest.mark.parametrize(
    ("kind", "view"),
    [
        ("bar", BarProgress),
        ("line", LineProgress),
        ("json", JsonProgress),
        ("silent", SilentProgress),
    ],
)
def test_each_kind_has_its_view(kind: progress.Kind, view: type, stream: io.StringIO) -> None:
    with progress.open_progress(kind, stream) as opened:
        assert type(opened) is view
        opened.disk_started("a/xvda", method="full", reason="first", total=0)
        opened.advanced("a/xvda", read=0, written=0)
        opened.disk_finished("a/xvda", DISK)
        opened.message("bye")


def test_a_pipe_gets_lines(stream: io.StringIO) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert progress.kind_for(stream) == "line"
    assert progress.kind_for(Terminal()) == "bar"
