"""Tests of cbtfs.background: a child that says when it is ready, and why if it never is."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cbtfs import background, errors

SCRIPT = """
import os, sys
from cbtfs import background
print("before", file=sys.stderr)
background.announce_ready()
print("after", file=sys.stderr)
os.write(1, b"and more\\n")
print(os.getcwd(), file=sys.stderr)
"""


def child(tmp_path: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a process that announces that it is ready."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        pass_fds=[int(environment.get(background.READY_FD, 2))],
        check=True,
    )


def test_the_ready_byte_is_sent_and_messages_then_go_to_the_log(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    log = tmp_path / "logs" / "cbtfs.log"
    environment = {background.READY_FD: str(write_end), background.LOG_FILE: str(log)}

    done = child(tmp_path, **environment)
    os.close(write_end)

    assert os.read(read_end, 10) == b"1"
    os.close(read_end)
    assert (done.stdout, done.stderr) == ("", "before\n")
    assert log.read_text() == "after\nand more\n/\n"
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_log_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    (tmp_path / "file").touch()
    log = tmp_path / "file" / "cbtfs.log"

    child(tmp_path, **{background.READY_FD: str(write_end), background.LOG_FILE: str(log)})

    assert os.read(read_end, 10) == b"1"
    os.close(read_end)
    os.close(write_end)


def test_in_the_foreground_messages_stay_where_they_are(tmp_path: Path) -> None:
    done = child(tmp_path)

    assert done.stdout == "and more\n"
    assert done.stderr == f"before\nafter\n{tmp_path}\n"


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, abstract: bool) -> None:
    name = f"@cbtfs-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(name.replace("@", "\0"))
        child(tmp_path, NOTIFY_SOCKET=name)

        assert systemd.recv(100) == b"READY=1"


def test_a_systemd_that_is_gone_is_no_matter(tmp_path: Path) -> None:
    child(tmp_path, NOTIFY_SOCKET=str(tmp_path / "gone"))


def test_the_end_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        background.announce_end()

        assert systemd.recv(100) == b"STOPPING=1"


def test_a_child_that_fails_passes_on_its_status_and_its_sentence(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert background.start_background(["no-such-verb"]) == 2
    assert "no-such-verb" in capfd.readouterr().err


def test_a_child_that_ends_well_before_it_is_ready_has_failed() -> None:
    assert background.start_background(["-q", "--version"]) == 1


@pytest.mark.parametrize(("script", "status"), [("kill -9 $$", 137), ("exit 13", 13)])
def test_the_status_is_as_a_shell_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, status: int
) -> None:
    monkeypatch.setattr(sys, "executable", program(tmp_path, script))

    assert background.start_background([]) == status


def test_a_child_that_is_ready_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = f"echo $$ >{tmp_path}/pid; printf 1 >&$CBTFS_READY_FD; exec sleep 60"
    monkeypatch.setattr(sys, "executable", program(tmp_path, go_on))

    assert background.start_background([]) == 0

    pid = int((tmp_path / "pid").read_text())
    assert os.getsid(pid) == pid
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 1)]
)
def test_what_ends_the_wait_ends_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, status: int
) -> None:
    # SIGUSR1 is none of those that are held back until the child is known, so it comes later
    later = "sleep 1; " if signum == signal.SIGUSR1 else ""
    ending = f"trap 'echo ended >{tmp_path}/ended; exit' INT TERM"
    patient = f"{ending}; {later}kill -{signum} $PPID; sleep 20 & wait"
    monkeypatch.setattr(sys, "executable", program(tmp_path, patient))

    def handler(number: int, _: object) -> None:
        if number == signal.SIGUSR1:
            raise errors.CbtfsError("something else")
        raise KeyboardInterrupt if number == signal.SIGINT else errors.Interrupted(number)

    before = signal.signal(signum, handler)
    try:
        with pytest.raises(errors.CbtfsError) as caught:
            background.start_background([])
    finally:
        signal.signal(signum, before)

    assert caught.value.exit_code == status
    assert (tmp_path / "ended").exists()


def test_a_child_that_says_it_was_interrupted_speaks_for_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "trap 'exit 130' INT; kill -INT $PPID; sleep 20 & wait"
    monkeypatch.setattr(sys, "executable", program(tmp_path, told))

    assert background.start_background([]) == 130


def program(tmp_path: Path, script: str) -> str:
    path = tmp_path / "program"
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o700)
    return str(path)


def test_the_log_is_where_logs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert background.default_log_file() == Path("/var/log/cbtfs.log")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert background.default_log_file().name == "cbtfs.log"
