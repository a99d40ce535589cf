"""Signals while a tool runs: whoever undoes what it did must not be overtaken by it."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from cbtfs import errors
from cbtfs.cli import failures
from cbtfs.programs import Programs
from cbtfs.signals import HeldBack


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    """The handler of a command, while a test runs."""
    before = signal.getsignal(signal.SIGTERM)
    failures.install_signal_handler()
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def tools() -> Iterator[Programs]:
    null = os.open(os.devnull, os.O_RDONLY)
    yield Programs(tell=lambda _: None, stdin=null)
    os.close(null)


def test_a_tool_that_is_just_being_started_does_not_outlive_the_signal(
    tools: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes while Popen waits to hear that the tool runs, as on a slow machine."""
    late = tmp_path / "late"
    asked = tmp_path / "asked"

    def read_slowly(fd: int, size: int) -> bytes:
        while not asked.exists():
            time.sleep(0.01)
        time.sleep(0.1)
        return real(fd, size)

    real = os.read
    monkeypatch.setattr(subprocess.os, "read", read_slowly)  # type: ignore[attr-defined]
    script = f"kill -TERM {os.getpid()}; touch {asked}; sleep 1; touch {late}"
    with pytest.raises(errors.Interrupted):
        tools.run("sh", "-c", script)

    time.sleep(1.2)
    assert not late.exists()


@pytest.mark.parametrize("send", ["TERM", "INT"])
def test_a_tool_that_runs_has_ended_when_the_signal_is_told(
    tools: Programs, tmp_path: Path, send: str
) -> None:
    told = tmp_path / "pid"
    script = f"echo $$ >{told}; kill -{send} {os.getpid()}; exec sleep 60"

    with pytest.raises((errors.Interrupted, KeyboardInterrupt)):
        tools.run("sh", "-c", script)

    assert not Path("/proc", told.read_text().strip()).exists()


def test_a_signal_as_the_handlers_are_given_back_costs_none_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, before = signal.signal, signal.getsignal(signal.SIGINT)

    def interrupted(number: int, handler: Callable[[int, FrameType | None], None]) -> object:
        if number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(number, handler)

    held = HeldBack()
    with monkeypatch.context() as patched:
        patched.setattr(signal, "signal", interrupted)
        with pytest.raises(errors.Interrupted):
            held.release()
    held.release()

    assert signal.getsignal(signal.SIGINT) is before


def test_told_the_same_twice_at_once_is_told_once(tools: Programs) -> None:
    cleaned: list[str] = []

    with pytest.raises(errors.Interrupted):
        try:
            tools.run("sh", "-c", f"kill -TERM {os.getpid()}; exec sleep 60")
        finally:
            cleaned.append(tools.run("sh", "-c", f"kill -TERM {os.getpid()}; echo done").stdout)

    assert cleaned == ["done\n"]
