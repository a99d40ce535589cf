"""Memory: what the directory of a simulated pool tells of it while it does not run.

Small on purpose, and without the pool itself: the command line imports it each time.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from cbtfs import errors

FIRST_ADDRESS = "127.0.0.2"
"""Address of the first host, unless another is asked for."""

SCENARIOS = ("default", "empty", "huge", "large", "speed")
"""What a fresh pool may hold; `scenarios` says what each is."""

_FILE = "server.json"


@dataclass(frozen=True, slots=True)
class Ports:
    """The two ports that every host of the pool listens on."""

    https: int
    nbd: int


class Memory(msgspec.Struct, frozen=True):
    """What is kept from one start to the next."""

    scenario: str = ""
    https_port: int = 0
    nbd_port: int = 0


def recall(directory: Path) -> Memory:
    """Return what the last start in ``directory`` kept."""
    try:
        return msgspec.json.decode((directory / _FILE).read_bytes(), type=Memory)
    except (OSError, msgspec.DecodeError):
        return Memory()


def keep(directory: Path, memory: Memory) -> None:
    """Keep ``memory`` for the next start in ``directory``."""
    (directory / _FILE).write_bytes(msgspec.json.encode(memory))


def check_name(scenario: str) -> None:
    """Raise UsageError unless there is a scenario of this name."""
    if scenario not in SCENARIOS:
        known = ", ".join(SCENARIOS)
        raise errors.UsageError(f"there is no scenario {scenario!r}; there are {known}")


def check_scenario(directory: Path, scenario: str) -> None:
    """Check that a pool can be started with ``scenario``; ``default`` fits what is there already.

    Raises:
        UsageError: no such scenario, or the directory holds another.
    """
    check_name(scenario)
    known = recall(directory).scenario
    if known and scenario not in {known, "default"}:
        raise errors.UsageError(
            f"{directory} holds a pool of the scenario {known} already; choose another directory"
        )
