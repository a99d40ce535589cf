"""Runs of the ``cbtfs`` command line with a fault at a chosen point, many of them in little time.

``Runner`` starts this file as a program that has everything imported, and forks for each run. The
child is the real command: it calls ``cbtfs.__main__.main`` with its arguments and ends as that
ends, or is killed.
"""

import faulthandler
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from ssl import SSLContext
from typing import Literal

import msgspec

from cbtfs import __main__ as program, upload
from cbtfs.cli.app import application
from cbtfs.handlers import Web
from cbtfs.wire import Lines
from cbtfs.xapi import Session

from .killpoints import Mode, Points

Calls = Literal["none", "changes", "all"]

HANGS = 120
"""Seconds after which a run counts as one that never ends, and is ended by SIGALRM."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One run: what is called, where its messages go, the fault, and constants of modules.

    With the ``calls`` that are changes what changes the pool counts too, and each question how a
    task is doing; with all of them everything that is sent to xapi, and each answer.
    """

    argv: list[str]
    directory: str
    root: str
    mode: Mode = "count"
    at: int = 0
    match: str = ""
    settings: dict[str, int] = {}
    calls: Calls = "none"


@dataclass(frozen=True, slots=True)
class Done:
    """How a run ended: as ``subprocess`` has it, -9 if it was killed; and what it left."""

    status: int
    out: str
    err: str
    trace: tuple[str, ...]

    @property
    def killed(self) -> bool:
        """Whether it was killed."""
        return self.status == -9

    def kinds(self) -> Counter[str]:
        """Return how many calls of each kind changed the store."""
        return Counter(line.split()[1] for line in self.trace)


class Runner:
    """Runs commands; made by ``open_runner``; what the last one left is in ``directory``.

    Attributes:
        settings: constants for all runs, in whatever modules of cbtfs have them.
    """

    def __init__(
        self, process: "subprocess.Popen[bytes]", directory: Path, settings: Mapping[str, int]
    ) -> None:
        self.directory = directory
        self.settings = dict(settings)
        self._process = process

    def run(
        self,
        argv: Sequence[str],
        *,
        root: Path,
        mode: Mode = "count",
        at: int = 0,
        match: str = "",
        calls: Calls = "none",
    ) -> Done:
        """Run ``cbtfs ARGV`` with a fault at the ``at``-th call that changes ``root``.

        Args:
            argv: arguments of the command.
            root: its store.
            mode: the kind of fault.
            at: which call, from 1; 0 for none.
            match: what the line of a call in the trace must contain to be counted for ``at``.
            calls: to the pool that are counted, too: none, those that change it, or all, with
                pieces of uploads, and the answers to both.
        """
        order = Order(
            argv=list(argv),
            directory=str(self.directory),
            root=str(root),
            mode=mode,
            at=at,
            match=match,
            settings=self.settings,
            calls=calls,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the runner is gone"
        return Done(
            status=int(answer),
            out=self._left("out"),
            err=self._left("err"),
            trace=tuple(self._left("trace").splitlines()),
        )

    def _left(self, name: str) -> str:
        return (self.directory / name).read_text(errors="surrogateescape")


@contextmanager
def open_runner(
    directory: Path, settings: Mapping[str, int] | None = None, *, under: Sequence[str] = ()
) -> Generator[Runner]:
    """Start a runner with files of its own in ``directory``, which it makes; end it on exit.

    Args:
        directory: where they are.
        settings: as in ``Runner.settings``.
        under: the command that runs it, such as ``strace``.
    """
    directory.mkdir()
    environment = os.environ | {"XDG_STATE_HOME": str(directory / "state")}
    with subprocess.Popen(
        [*under, sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        cwd=Path(__file__).parent.parent,
    ) as process:
        yield Runner(process, directory, settings or {})
        assert process.stdin is not None
        process.stdin.close()


def _serve() -> None:
    """Answer each order on stdin with the status of its run."""
    application()  # the modules of all verbs: no run imports its own
    for line in sys.stdin.buffer:
        order = msgspec.json.decode(line, type=Order)
        child = os.fork()
        if child == 0:
            _become(order)
            program.main()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201 - the answer


def _become(order: Order) -> None:
    """Make this process the one that was ordered, up to its first line of code."""
    directory = Path(order.directory)
    for number, name in enumerate((os.devnull, "out", "err")):
        fd = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(fd, number)
        os.close(fd)
    faulthandler.dump_traceback_later(HANGS - 5)
    signal.alarm(HANGS)
    points = Points(
        Path(order.root),
        mode=order.mode,
        at=order.at,
        match=order.match,
        trace=directory / "trace",
    )
    points.install()
    if order.calls == "changes":
        _count_calls(points)
    elif order.calls == "all":
        _count_all(points)
    for name, value in order.settings.items():
        having = [m for at, m in sys.modules.items() if at.startswith("cbtfs.") and name in vars(m)]
        assert having, f"no module has {name}"
        for module in having:
            setattr(module, name, value)
    sys.argv = ["cbtfs", *order.argv]


def _count_calls(points: Points) -> None:
    call, fetch_raw = Session.call, Session._fetch_raw

    async def counted_call(self: Session, method: str, *arguments: object) -> object:
        points.call(method)
        return await call(self, method, *arguments)

    async def counted_fetch(self: Session, method: str, *arguments: object) -> bytes:
        if method == "task.get_status":  # between the beginning and the end of a call
            points.call(method)
        return await fetch_raw(self, method, *arguments)

    setattr(Session, "call", counted_call)  # noqa: B010 - a method cannot be assigned
    setattr(Session, "_fetch_raw", counted_fetch)  # noqa: B010


def _count_all(points: Points) -> None:
    """Count what leaves for xapi before it is sent, and again when its answer is there."""
    call, post = Lines.call, Web.post
    patiently, answer = vars(upload)["_patiently"], vars(upload)["_answer"]

    async def counted_call(
        self: Lines, host: str, context: SSLContext, method: str, params: Sequence[object]
    ) -> object:
        points.call(method)
        value = await call(self, host, context, method, params)
        points.call(f"{method} answered")
        return value

    async def counted_post(
        self: Web, host: str, context: SSLContext, method: str, params: Sequence[object]
    ) -> bytes:
        points.call(method)
        value = await post(self, host, context, method, params)
        points.call(f"{method} answered")
        return value

    async def counted_piece(stream: object, data: bytes | memoryview) -> None:
        points.call("upload")
        await patiently(stream, data)
        points.call("upload sent")

    async def counted_answer(stream: object) -> bytes:
        data: bytes = await answer(stream)
        points.call("upload answered")
        return data

    setattr(Lines, "call", counted_call)  # noqa: B010
    setattr(Web, "post", counted_post)  # noqa: B010
    setattr(upload, "_patiently", counted_piece)  # noqa: B010
    setattr(upload, "_answer", counted_answer)  # noqa: B010


if __name__ == "__main__":
    _serve()
