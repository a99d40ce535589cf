import os
import subprocess
import sys
from dataclasses import replace

from cbtfs import process
from cbtfs.process import Process, this_process


def test_this_process_is_alive() -> None:
    assert this_process().pid == os.getpid()
    assert not this_process().is_dead()


def test_an_ended_process_is_dead() -> None:
    command = [sys.executable, "-c", "import cbtfs.process as p; print(p.this_process().starttime)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        started = int(child.communicate()[0])

    assert started > 0
    assert replace(this_process(), pid=child.pid, starttime=started).is_dead()


def test_a_zombie_is_dead() -> None:
    with subprocess.Popen(["sleep", "1000"]) as child:
        started = process._starttime(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

        assert started > 0
        assert replace(this_process(), pid=child.pid, starttime=started).is_dead()


def test_a_process_may_have_any_name() -> None:
    name = "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xff) 1 (', 0, 0, 0); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()

        assert process._starttime(child.pid) > 0
        child.kill()


def test_a_later_process_with_the_same_number_is_another() -> None:
    assert replace(this_process(), starttime=this_process().starttime + 1).is_dead()


def test_a_reboot_ends_every_process() -> None:
    assert replace(this_process(), boot="another").is_dead()


def test_nothing_is_known_of_other_machines() -> None:
    assert not Process("elsewhere.example", "boot", 1, 1).is_dead()
