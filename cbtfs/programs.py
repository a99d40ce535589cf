"""Programs: the system's own tools, run for somebody who sees each command.

What is told can be pasted into a shell. Nothing is run through a shell.
"""

import os
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from . import errors
from .signals import HeldBack

PACKAGES = {"blkid": "util-linux", "partx": "util-linux", "mount": "mount", "umount": "mount"}
"""The package that has a tool, where Debian and Fedora call it alike or nearly so."""


@dataclass(slots=True)
class Programs:
    """Runs tools one after the other.

    Attributes:
        tell: hears of each command before it runs.
        stdin: a descriptor that each of them has as its standard input. None reads it: what it
            stands for (a lock) is held as long as any of them runs.
        commands: what was run, as it can be pasted.
    """

    tell: Callable[[str], None]
    stdin: int
    commands: list[str] = field(default_factory=list[str])

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a tool to its end, whatever that is; what it says is in no other language.

        After an interruption it runs no more: whoever undoes what it did sees all of it.

        Raises:
            MountError: it is not installed.
        """
        told = shlex.join(words)
        self.commands.append(told)
        self.tell(told)
        held = HeldBack()
        try:
            with _start(words, self.stdin) as process:
                try:
                    held.release()
                    stdout, stderr = process.communicate()
                except BaseException:
                    process.kill()
                    process.wait()  # a mount(2) in the kernel goes on to its end
                    raise
        finally:
            held.release()
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def _start(words: Sequence[str], stdin: int) -> subprocess.Popen[str]:
    environment = os.environ | {"LC_ALL": "C"}
    path = environment.get("PATH", os.defpath)
    environment["PATH"] = f"{path}:/usr/sbin:/sbin"  # a user's own PATH may lack them
    try:
        return subprocess.Popen(
            words,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
        )
    except FileNotFoundError:
        package = PACKAGES.get(words[0], "coreutils")
        raise errors.MountError(
            f"{words[0]} is not installed; install the package {package}"
        ) from None


def said(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a tool complained about, in one line without a period."""
    return " ".join(done.stderr.split()).rstrip(".") or f"exit status {done.returncode}"
