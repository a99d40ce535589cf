"""Start, stop and steer a simulated pool: nothing is left behind, state survives."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest

from cbtfs import errors, simulator
from cbtfs.simulator import memory, scenarios

from .simulated import Api, Failure, running_pool


def processes(directory: Path) -> list[str]:
    """Return the command lines of processes that name ``directory``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if "cbtfs.simulator" in line and str(directory) in line:
            found.append(line)
    return found


def test_start_returns_when_the_pool_answers(tmp_path: Path) -> None:
    with running_pool(tmp_path / "pool", "empty") as pool:
        api = Api(pool).login()

        assert len(api.records("host")) == 2


def test_the_config_is_ready_for_use(tmp_path: Path) -> None:
    with running_pool(tmp_path / "pool", "empty") as pool:
        config = tomllib.loads(pool.config.read_text())

    assert config["pool"]["sim"]["url"] == pool.url
    assert Path(config["pool"]["sim"]["password_file"]).read_text() == "simulated\n"
    assert Path(config["pool"]["sim"]["ca_file"]).read_text().count("BEGIN CERTIFICATE") == 2
    assert config["store"]["main"]["path"] == str(tmp_path / "pool" / "store")


def test_stop_leaves_no_process_and_no_socket(tmp_path: Path) -> None:
    with running_pool(tmp_path / "pool", "huge") as pool:
        assert pool.guest_socket("huge", "xvda").exists()
        assert processes(pool.directory)

    assert processes(tmp_path / "pool") == []
    assert not simulator.is_running(tmp_path / "pool")
    assert list((tmp_path / "pool").rglob("*.sock")) == []


def test_stop_of_nothing_says_so(tmp_path: Path) -> None:
    assert simulator.stop(tmp_path) is False


def test_stop_works_after_a_crash(tmp_path: Path) -> None:
    status = simulator.start(tmp_path / "pool", scenario="empty")
    os.kill(int(str(status["pid"])), signal.SIGKILL)
    while simulator.is_running(tmp_path / "pool"):
        time.sleep(0.01)

    assert simulator.stop(tmp_path / "pool") is False
    with running_pool(tmp_path / "pool") as pool:
        assert Api(pool).login().records("host")


def test_a_second_start_is_refused(tmp_path: Path) -> None:
    with running_pool(tmp_path / "pool", "empty"):
        with pytest.raises(errors.UsageError, match="already"):
            simulator.start(tmp_path / "pool")


def test_an_unknown_scenario_is_refused_before_anything(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="default, empty"):
        simulator.start(tmp_path / "pool", scenario="defualt")

    assert not (tmp_path / "pool").exists()


def test_another_scenario_is_refused_where_a_pool_lives(tmp_path: Path) -> None:
    with running_pool(tmp_path / "pool", "empty"):
        pass

    with pytest.raises(errors.UsageError, match="scenario empty already"):
        simulator.start(tmp_path / "pool", scenario="huge")


def test_a_start_that_fails_leaves_no_process(tmp_path: Path) -> None:
    directory = tmp_path / "pool"
    directory.mkdir()
    (directory / "hosts").write_text("a file where a folder must be")

    with pytest.raises(errors.CbtfsError, match="does not start"):
        simulator.start(directory, scenario="empty")

    assert processes(directory) == []
    assert not simulator.is_running(directory)


def test_nothing_runs_where_nothing_was_started(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFound, match="no simulated pool runs"):
        simulator.status(tmp_path)


def test_records_survive_a_restart_and_sessions_do_not(tmp_path: Path) -> None:
    with running_pool(tmp_path / "pool", "huge") as pool:
        api = Api(pool).login()
        vm = api.named("VM", "huge")
        api.call("VM.set_name_label", vm, "renamed")

    with running_pool(tmp_path / "pool") as again:
        with pytest.raises(Failure, match="SESSION_INVALID"):
            Api(again, session=api.session).records("VM")
        assert Api(again).login().named("VM", "renamed") == vm
        assert (again.https_port, again.nbd_port) == (pool.https_port, pool.nbd_port)


def test_disks_survive_a_restart(tmp_path: Path) -> None:
    with running_pool(tmp_path / "pool", "huge") as pool:
        disk = pool.open_guest("huge", "xvda")
        disk.pwrite(b"kept" * 4096, 3 << 40)
        disk.shutdown()

    with running_pool(tmp_path / "pool") as pool:
        disk = pool.open_guest("huge", "xvda")
        assert disk.pread(4 * 4096, 3 << 40) == b"kept" * 4096
        disk.shutdown()


def test_the_certificates_survive_a_restart(tmp_path: Path) -> None:
    with running_pool(tmp_path / "pool", "empty") as pool:
        before = pool.ca_file.read_bytes()
    with running_pool(tmp_path / "pool") as pool:
        assert pool.ca_file.read_bytes() == before


def test_several_pools_run_side_by_side(tmp_path: Path) -> None:
    with running_pool(tmp_path / "a", "empty") as one, running_pool(tmp_path / "b", "empty") as two:
        assert one.url != two.url
        assert Api(one).login().session != Api(two).login().session


def test_another_port_is_taken_when_the_last_one_is_not_free(tmp_path: Path) -> None:
    with running_pool(tmp_path / "pool", "empty") as pool:
        taken = pool.https_port
    with socket.create_server(("127.0.0.2", taken)):
        with running_pool(tmp_path / "pool") as again:
            assert again.https_port != taken


def test_ports_can_be_chosen(tmp_path: Path) -> None:
    with running_pool(tmp_path / "pool", "empty") as pool:
        ports = simulator.Ports(https=pool.https_port, nbd=pool.nbd_port)

    status = simulator.start(tmp_path / "other", scenario="empty", ports=ports)
    simulator.stop(tmp_path / "other")

    assert (status["https_port"], status["nbd_port"]) == (ports.https, ports.nbd)


def test_set_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with running_pool(tmp_path / "pool", "empty") as pool:
        with pytest.raises(errors.UsageError, match=r"nearest is 'nbd\.delay'"):
            pool.set("nbd.dleay", "2ms")
        with pytest.raises(errors.UsageError):
            pool.set("nbd.delay", "soon")
        pool.set("nbd.delay", "2ms")
        assert pool.faults() == ["nbd.delay"]
        pool.set("nbd.delay", "")
        assert pool.faults() == []


def test_an_unknown_command_is_refused(tmp_path: Path) -> None:
    with running_pool(tmp_path / "pool", "empty") as pool:
        with pytest.raises(errors.CbtfsError):
            pool.control("no-such-command")


def test_stop_does_not_wait_for_what_waits(tmp_path: Path) -> None:
    with running_pool(tmp_path / "pool", "huge") as pool:
        api = Api(pool).login()
        pool.set("nbd.silent", "*")
        pool.set("xapi.delay", "VDI.get_all_records:100")
        silent = [socket.create_connection(("127.0.0.12", pool.nbd_port)) for _ in range(10)]
        slow = threading.Thread(target=call_until_closed, args=(api, "VDI.get_all_records"))
        waiting = threading.Thread(
            target=call_until_closed, args=(api, "event.from", ["vm"], "", 100.0)
        )
        for thread in (slow, waiting):
            thread.start()
        before = time.monotonic()
        simulator.stop(pool.directory)
        took = time.monotonic() - before
        for thread in (slow, waiting):
            thread.join()
        for connection in silent:
            connection.close()

    assert took < 5


def call_until_closed(api: Api, method: str, *params: object) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException, Failure):
        while True:
            api.call(method, *params)


def test_a_removed_directory_ends_the_pool(tmp_path: Path) -> None:
    with running_pool(tmp_path / "pool", "empty") as pool:
        pid = int(str(simulator.status(pool.directory)["pid"]))
        pool.directory.rename(tmp_path / "moved")
        deadline = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)

    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_two_builds_are_equal(tmp_path: Path) -> None:
    seen = []
    for name in ("one", "two"):
        with running_pool(tmp_path / name) as pool:
            api = Api(pool).login()
            seen.append(
                sorted(
                    (str(record["uuid"]), str(record["name_label"]))
                    for record in api.records("VDI").values()
                )
            )

    assert seen[0] == seen[1]


@pytest.mark.parametrize("command", [["cbtfs.simulator"], ["cbtfs", "sim", "start", "-f"]])
def test_it_runs_in_the_foreground(tmp_path: Path, command: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", *command, str(tmp_path / "pool"), "--scenario", "empty"],
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            try:
                simulator.status(tmp_path / "pool")
                break
            except errors.NotFound:
                assert process.poll() is None
                time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_who_steers_a_pool_does_not_import_it() -> None:
    code = "import sys, cbtfs.simulator; print(*(m for m in sys.modules if 'cbtfs.sim' in m))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert not {"cbtfs.simulator.server", "cbtfs.simulator.pool"} & set(done.stdout.split())


def test_the_scenarios_are_those_that_can_be_named() -> None:
    assert tuple(sorted(scenarios.SCENARIOS)) == memory.SCENARIOS
