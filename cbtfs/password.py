"""Passwords: read from a file, a command or systemd's credentials, at the moment they are needed.

A password is never in an argument, in the environment, in a message or in a log.
"""

import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import errors

PASSWORD_COMMAND_SECONDS = 60.0
"""A password manager that asks nobody answers at once; one that waits for a person never does."""

Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the password of a pool comes from: the first that is set of command, file, systemd.

    Attributes:
        name: the pool, for messages and for ``NAME.password`` among systemd's credentials.
        file: a file whose contents, without the final newline, are the password.
        command: program and arguments that print it; no shell is used.
        credentials_directory: systemd's ``$CREDENTIALS_DIRECTORY``.
    """

    name: str
    file: str = ""
    command: tuple[str, ...] = ()
    credentials_directory: str = ""


def read(source: Source, *, warn: Warn) -> str:
    """Return the password.

    Args:
        source: where to look.
        warn: takes a sentence if the file is readable by everybody.

    Raises:
        ConfigError: no source is named, it cannot be read, or it is empty.
    """
    if source.command:
        password = _of_command(source.command, name=source.name)
    elif source.file:
        password = _of_file(Path(source.file), warn=warn)
    else:
        password = _of_systemd(source)
    if not password:
        raise errors.ConfigError(f"the password of pool {source.name} is empty")
    return password


def _of_file(path: Path, *, warn: Warn) -> str:
    try:
        mode = path.stat().st_mode
        password = path.read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as exc:
        raise errors.ConfigError(f"{path}: cannot read the password: {exc.strerror}") from None
    except ValueError:
        raise errors.ConfigError(f"{path}: the password is not UTF-8 text") from None
    if stat.S_ISREG(mode) and mode & stat.S_IROTH:
        warn(f"{path} is readable by everybody; protect the password with: chmod 600 {path}")
    return password


def _of_command(command: tuple[str, ...], *, name: str) -> str:
    where = f"the password_command of pool {name}"
    try:
        done = subprocess.run(  # program and arguments as configured, no shell
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PASSWORD_COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise errors.ConfigError(f"{where} took over {PASSWORD_COMMAND_SECONDS:.0f} s") from None
    except (OSError, ValueError) as exc:
        raise errors.ConfigError(f"{where} cannot be run: {exc}") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise errors.ConfigError(f"{where} failed with exit status {done.returncode}: {said}")
    return done.stdout.rstrip("\r\n")


def _of_systemd(source: Source) -> str:
    directory = source.credentials_directory
    for file in (f"{source.name}.password", "cbtfs.password") if directory else ():
        path = Path(directory, file)
        if path.is_file():
            return _of_file(path, warn=_ignore)
    raise errors.ConfigError(
        f"pool {source.name} has no password: set password_file or password_command in its table,"
        " or CBTFS_PASSWORD_FILE"
    )


def _ignore(_: str) -> None:
    """Say nothing: systemd's credentials are as private as it makes them."""
