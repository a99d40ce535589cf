"""Impostors, attackers and silent pools, met by the real command: the status, and what they got."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .commands import Shell, items
from .simulated import RunningPool, running_pool

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPool]:
    with running_pool(tmp_path_factory.mktemp("refused") / "pool") as running:
        yield running


@pytest.fixture
def pool(simulated: RunningPool) -> Iterator[RunningPool]:
    simulated.stolen()
    yield simulated
    for key in simulated.faults():
        simulated.set(key, "")


@pytest.fixture
def shell(pool: RunningPool, tmp_path: Path) -> Shell:
    return Shell(pool, tmp_path / "store")


def told(done: subprocess.CompletedProcess[str]) -> str:
    """Return what the command says of the failure, which must be one sentence a line."""
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize("fault", ["nbd.impostor", "nbd.strip", "nbd.no_tls"])
def test_no_byte_of_a_session_reaches_a_wrong_nbd_host(
    pool: RunningPool, shell: Shell, fault: str
) -> None:
    pool.set(fault, "*")

    done = shell.run("-q", "sync", "--vm", "db1", status=12)

    told(done)
    assert pool.stolen() == []
    pool.set(fault, "")
    assert items(shell.json("list"), "vms") == []
    shell.run("-q", "sync", "--vm", "db1")


def test_an_impostor_of_xapi_learns_no_password(pool: RunningPool, shell: Shell) -> None:
    pool.set("http.impostor", "*")

    done = shell.run("ls", status=12)

    assert told(done).count("\n") == 1
    assert pool.stolen() == []


def test_a_wrong_fingerprint_is_refused(pool: RunningPool, shell: Shell) -> None:
    wrong = "sha256:" + "00" * 32
    config = shell.store.parent / "wrong.toml"
    lines = pool.config.read_text().splitlines()
    config.write_text(
        "\n".join(f'fingerprint = "{wrong}"' if li.startswith("ca_file") else li for li in lines)
    )

    done = shell.run("--config", str(config), "ls", status=12)

    assert "fingerprint" in told(done)


def test_a_wrong_password_is_refused(pool: RunningPool, shell: Shell) -> None:
    password = shell.store.parent / "password"
    password.write_text("wrong\n")
    password.chmod(0o600)
    config = shell.store.parent / "wrong.toml"
    lines = pool.config.read_text().splitlines()
    config.write_text(
        "\n".join(
            f'password_file = "{password}"' if line.startswith("password_file") else line
            for line in lines
        )
    )

    done = shell.run("--config", str(config), "ls", status=12)

    assert told(done).count("\n") == 1


def test_a_pool_that_is_down_is_unreachable(tmp_path: Path) -> None:
    with running_pool(tmp_path / "pool", scenario="empty") as pool:
        shell = Shell(pool, tmp_path / "store")
        shell.run("ls")

    done = shell.run("ls", status=13)

    assert told(done).count("\n") == 1
