"""The command line by itself: help, statuses, sentences, tables, JSON. No pool is needed here."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import typer

from cbtfs import errors, plan
from cbtfs.catalogue import Catalogue, DiskPoint, Point, VMHistory
from cbtfs.cli import app, failures, listing, mounting, output, running
from cbtfs.inventory import SR, VBD, VDI, VM, Inventory, Pool
from cbtfs.plan import VMPlan
from cbtfs.sync import Target

from .program import Program, Result, untouched_process

LATER = ("check", "metrics", "report")
NOW = (
    *("ls", "info", "mount", "umount", "sync", "list", "diff", "verify", "prune", "pin", "unpin"),
    *("restore", "open", "close", "clean"),
    *("doctor", "config", "sim", "demo"),
)


@pytest.fixture
def cbtfs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Program]:
    for name in [name for name in os.environ if name.startswith("CBTFS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    with untouched_process():
        yield Program(capsys)


def commands() -> Iterator[tuple[str, typer.core.TyperCommand | typer.core.TyperGroup]]:
    """Yield the path of every command with it."""
    todo: list[tuple[str, object]] = [("cbtfs", typer.main.get_command(app.application()))]
    while todo:
        path, command = todo.pop()
        assert isinstance(command, typer.core.TyperCommand | typer.core.TyperGroup)
        yield path, command
        if isinstance(command, typer.core.TyperGroup):
            todo += [(f"{path} {name}", inner) for name, inner in command.commands.items()]


# ── Help ──


@pytest.mark.parametrize(("path", "command"), list(commands()))
def test_every_help_has_an_example(
    path: str, command: typer.core.TyperCommand | typer.core.TyperGroup
) -> None:
    assert command.epilog is not None
    assert command.epilog.startswith("Example: cbtfs "), path


def test_verbs_of_this_version_are_all_there() -> None:
    root = typer.main.get_command(app.application())

    assert isinstance(root, typer.core.TyperGroup)
    assert set(root.commands) == set(NOW)
    assert list(root.commands) == list(app.VERBS)


@pytest.mark.parametrize("verb", NOW)
def test_a_verb_is_there_when_only_its_module_is(verb: str) -> None:
    root = typer.main.get_command(app.application(verb))

    assert isinstance(root, typer.core.TyperGroup)
    assert verb in root.commands


@pytest.mark.parametrize(
    ("arguments", "verb"),
    [
        (["list"], "list"),
        (["--store", "sync", "-qv", "list", "diff"], "list"),
        (["--store=sync", "--", "list"], "list"),
        (["--json", "--version"], ""),
        (["--store"], ""),
        ([], ""),
    ],
)
def test_the_verb_is_found_among_the_options(arguments: list[str], verb: str) -> None:
    assert app.verb_of(arguments) == verb


@pytest.mark.parametrize("verb", LATER)
def test_later_verbs_do_not_exist_as_stubs(cbtfs: Program, verb: str) -> None:
    result = cbtfs(verb)

    assert result.status == 2
    assert result.err.startswith(f"cbtfs: no such command '{verb}'")


def test_version_is_one_line(cbtfs: Program) -> None:
    assert cbtfs("--version") == Result(0, "cbtfs 0.1.0\n", "")


def test_no_arguments_print_the_help(cbtfs: Program) -> None:
    result = cbtfs()

    assert result.status == 2
    assert "sync" in result.out + result.err


# ── Mistakes on the command line ──


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["lss"], "cbtfs: no such command 'lss'. Did you mean 'ls'?\n"),
        (["ls", "--json"], "cbtfs: --json goes before the verb: cbtfs --json VERB …\n"),
        (["ls", "--nope"], "cbtfs: no such option: --nope; see 'cbtfs ls --help'\n"),
        (["sync", "job", "--vm", "x"], "cbtfs: give jobs, or --vm and --vdi, not both\n"),
        (["sync", "--limit-rate", "50", "--vm", "x"], "cbtfs: --limit-rate: '50' is 50 B/s"),
        (["sync", "--lock-wait", "9", "--vm", "x"], "cbtfs: --lock-wait: '9' is not a duration"),
        (["sim", "set", "/tmp", "x"], "cbtfs: 'x' is no setting; write KEY=VALUE"),
        (["mount", "-o", "lve=off", "/x"], "cbtfs: -o lve is no option of mount"),
        (["ls"], "cbtfs: no pool is configured; set CBTFS_URL"),
        (["list"], "cbtfs: no store is configured; use --store DIR"),
        (["sync"], "cbtfs: nothing to sync: name a job"),
        (["config", "path"], "cbtfs: no configuration file; looked for /etc/cbtfs/cbtfs.toml"),
        (["--config", "/no/such", "ls"], "cbtfs: /no/such: no such file (--config)\n"),
    ],
)
def test_mistake_is_one_sentence_and_status_2(
    cbtfs: Program, arguments: list[str], sentence: str
) -> None:
    result = cbtfs(*arguments)

    assert (result.status, result.out) == (2, "")
    assert result.err.startswith(sentence)
    assert result.err.count("\n") == 1


def test_store_that_is_not_there_is_an_error_and_is_not_made(
    cbtfs: Program, tmp_path: Path
) -> None:
    result = cbtfs("--store", str(tmp_path / "none"), "list")

    assert result.status != 0
    assert str(tmp_path / "none") in result.err
    assert not (tmp_path / "none").exists()


def test_status_of_a_pool_that_does_not_run_is_not_found(cbtfs: Program, tmp_path: Path) -> None:
    assert cbtfs("sim", "status", str(tmp_path)).status == 10


# ── mount(8) ──


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("prod /mnt", "--pool prod mount -- /mnt"),
        ("none /mnt -o ro,live=off", "mount -o ro,live=off -- /mnt"),
        (
            "prod /mnt -n -o rw,config=/c,store=/s",
            "--pool prod --config /c --store /s mount -o rw -- /mnt",
        ),
    ],
)
def test_helper_of_mount_understands_what_it_is_given(words: str, arguments: str) -> None:
    assert mounting.helper_arguments(words.split()) == arguments.split()


def test_helper_of_mount_wants_pool_and_directory() -> None:
    with pytest.raises(errors.UsageError, match="write: mount -t"):
        mounting.helper_arguments(["/mnt"])


# ── config ──


def write_config(tmp_path: Path) -> str:
    path = tmp_path / "cbtfs.toml"
    path.write_text(
        '[pool.p]\nurl = "https://h"\n[store."a b"]\npath = "s"\n[job.j]\nvms = ["x"]\n'
    )
    return str(path)


def test_config_show_prints_toml_with_defaults(cbtfs: Program, tmp_path: Path) -> None:
    result = cbtfs("--config", write_config(tmp_path), "config", "show")

    assert '[pool.p]\nurl = "https://h"\nuser = "root"\n' in result.out
    assert "connections_per_host = 12\n" in result.out
    assert '[store."a b"]\npath = "s"\n' in result.out


def test_config_show_and_path_speak_json(cbtfs: Program, tmp_path: Path) -> None:
    path = write_config(tmp_path)

    shown = json.loads(cbtfs("--config", path, "--json", "config", "show").out)
    told = json.loads(cbtfs("--config", path, "--json", "config", "path").out)

    assert (shown["schema"], shown["store"]["a b"]["path"]) == (1, "s")
    assert told == {"schema": 1, "path": path}


def test_config_check_counts_and_warns(cbtfs: Program, tmp_path: Path) -> None:
    path = write_config(tmp_path)
    with Path(path).open("a") as file:
        file.write('hooks = { after = ["true"] }\n')

    result = cbtfs("--config", path, "config", "check")

    assert result.status == 0
    assert "warning: " in result.out
    assert "job.j: hooks have no effect" in result.out
    assert result.out.endswith("ok, 1 pools, 1 stores, 1 jobs\n")


# ── The door for errors ──


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.StoreError("it broke"), 1),
        (errors.ConfigError("it broke"), 2),
        (errors.ImageDamaged("it broke"), 4),
        (errors.NotFound("it broke"), 10),
        (errors.StoreLocked("it broke"), 11),
        (errors.AuthenticationFailed("it broke"), 12),
        (errors.PoolUnreachable("it broke"), 13),
        (
            ExceptionGroup("", [ValueError(), ExceptionGroup("", [errors.StoreError("it broke")])]),
            1,
        ),
    ],
)
def test_error_is_one_sentence_and_its_status(
    capsys: pytest.CaptureFixture[str], error: Exception, status: int
) -> None:
    assert failures.report(error, verbosity=0) == status
    assert capsys.readouterr().err == "cbtfs: it broke\n"


def test_interruption_beats_what_it_broke(capsys: pytest.CaptureFixture[str]) -> None:
    group = ExceptionGroup("", [errors.StoreError("x"), errors.Interrupted(15)])

    assert failures.report(group, verbosity=0) == 143
    assert "interrupted" in capsys.readouterr().err


def test_mistake_of_ours_asks_for_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert failures.report(KeyError("x"), verbosity=0) == 1
    assert capsys.readouterr().err.startswith("cbtfs: this is a mistake in cbtfs: KeyError: 'x'; ")


def test_traceback_comes_only_with_vv(capsys: pytest.CaptureFixture[str]) -> None:
    failures.report(errors.StoreError("x"), verbosity=1)
    without = capsys.readouterr().err
    failures.report(errors.StoreError("x"), verbosity=2)
    with_it = capsys.readouterr().err

    assert "StoreError" not in without
    assert "StoreError" in with_it


def test_escape_sequence_in_an_error_is_shown_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    failures.report(errors.StoreError("VM '\x1b[31mred\x1b[0m'"), verbosity=0)

    assert capsys.readouterr().err == "cbtfs: VM '\\x1b[31mred\\x1b[0m'\n"


# ── Signals ──


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_cancels_the_work_which_cleans_up(signum: signal.Signals, status: int) -> None:
    cleaned: list[str] = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), signum)
            await trio.sleep_forever()
        finally:
            cleaned.append("yes")

    with pytest.raises(errors.Interrupted) as caught:
        running.run(work)

    assert (caught.value.exit_code, cleaned) == (status, ["yes"])


def test_run_returns_what_the_work_returns() -> None:
    async def work() -> int:
        await trio.lowlevel.checkpoint()
        return 42

    assert running.run(work) == 42


def test_threads_share_their_memory() -> None:
    program = (
        "import ctypes, threading\n"
        "from cbtfs.cli import running\n"
        "async def work():\n"
        "    libc, met = ctypes.CDLL(None), threading.Barrier(9)\n"
        "    libc.malloc.restype = ctypes.c_void_p\n"
        "    def use():\n"
        "        libc.malloc(ctypes.c_size_t(1000))\n"
        "        met.wait()\n"
        "        met.wait()\n"
        "    for _ in range(8):\n"
        "        threading.Thread(target=use).start()\n"
        "    met.wait()\n"
        "    libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, 'stdout'))\n"
        "    libc.fflush(None)\n"
        "    met.wait()\n"
        "running.run(work)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.count("<heap nr=") == running.ARENAS


def test_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, trio\n"
        "from cbtfs import signals\n"
        "from cbtfs.cli import running\n"
        "async def work():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        await trio.sleep_forever()\n"
        "    finally:\n"
        "        with trio.CancelScope(shield=True):\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "            await trio.sleep(2 * signals.ONE_SIGNAL)\n"
        "            print('that was one signal', flush=True)\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "            await trio.sleep_forever()\n"
        "running.run(work)\n"
    )

    done = subprocess.run([sys.executable, script], check=False, capture_output=True, text=True)

    assert done.returncode == 143
    assert done.stdout == "that was one signal\n"


def test_reader_that_is_gone_ends_the_command_quietly(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "cbtfs", "--config", write_config(tmp_path), "config", "show"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write_end)

    assert (done.returncode, done.stderr) == (141, b"")


# ── Tables and JSON ──


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("web1", "web1"),
        ("Büro-Server 数据", "Büro-Server 数据"),
        ("[bold]x[/bold]", "[bold]x[/bold]"),
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("a\nb\tc\x9b31m", "a\\x0ab\\x09c\\x9b31m"),
        ("gnp.\u202eexe", "gnp.\\u202eexe"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_name_is_shown_so_that_it_cannot_drive_a_terminal(name: str, shown: str) -> None:
    assert output.safe(name) == shown


def test_json_carries_a_hostile_name_exactly_and_in_ascii(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "\x1b[31m\u202e数\x9b"

    output.document({"name": name})

    printed = capsys.readouterr().out
    assert printed.isascii()
    assert "\x1b" not in printed
    assert json.loads(printed) == {"schema": 1, "name": name}


def test_table_aligns_columns_by_cells() -> None:
    table = output.Table(["NAME", ">SIZE"])
    table.add("数据", "1 B")
    table.add("a", "100 KiB")

    assert table.lines() == ["NAME     SIZE", "数据      1 B", "a     100 KiB"]


def test_table_gives_way_in_its_flexible_column_on_a_terminal() -> None:
    table = output.Table(["NAME", ">SIZE"], flexible=(0,))
    table.add("a rather long name", "1 B")

    assert table.lines(width=20)[1] == "a rather long…   1 B"
    assert table.lines()[1] == "a rather long name   1 B"


# ── What ls shows ──


def inventory() -> Inventory:
    snapshot = VDI(ref="S", uuid=uuid(3), sr_ref="R", is_a_snapshot=True, snapshot_of="V")
    return Inventory(
        pool=Pool(uuid=uuid(9), name="p"),
        srs={"R": SR(ref="R", uuid=uuid(8), name="shared", host_refs=("H",), cbt_capable=True)},
        vms={"M": VM(ref="M", uuid=uuid(1), name="web1", vbd_refs=("B",))},
        vbds={"B": VBD(ref="B", vm_ref="M", vdi_ref="V", device="xvda")},
        vdis={
            "V": VDI(
                ref="V", uuid=uuid(2), name="root", sr_ref="R", size=1 << 30, cbt_enabled=True
            ),
            "S": snapshot,
            "D": VDI(ref="D", uuid=uuid(4), name="loose", sr_ref="R"),
        },
    )


def uuid(number: int) -> str:
    return f"00000000-0000-0000-0000-{number:012d}"


def catalogue(*, vdi_uuid: str) -> Catalogue:
    disk = DiskPoint(device="xvda", file="xvda.raw", vdi_uuid=vdi_uuid, size=1 << 30)
    point = Point(time="20261122T020000Z", vm_uuid=uuid(1), vm_name="web1", disks=(disk,))
    return Catalogue({uuid(1): VMHistory(uuid(1), "web1", (point,))})


def first(target: Target) -> VMPlan:
    """Plan the first restore point."""
    if isinstance(target, VM):
        return plan.plan_vm(inventory(), target, None, store="")
    return plan.plan_vdi(inventory(), target, None, store="")


def test_disk_has_snapshots_change_tracking_and_next_step() -> None:
    [web1, detached] = listing.build(inventory(), catalogue=Catalogue({}), planner=first)

    [disk] = web1.disks
    assert (disk.cbt, len(disk.snapshots), disk.intent) == ("on", 1, "full (first)")
    assert [row.vdi.name for row in detached.disks] == ["loose"]


def test_a_disk_is_found_by_the_name_that_is_printed() -> None:
    known = inventory()
    hostile = replace(known.vdis["D"], name="a\x1bb")
    known = replace(
        known,
        vdis={**known.vdis, "D": hostile},
        vms={"M": replace(known.vms["M"], name="line\nbreak")},
    )

    assert listing.find_disk(known, "a\\x1bb") == hostile
    assert listing.find_disk(known, "line\\x0abreak/xvda") == known.vdis["V"]


def test_without_a_store_nothing_is_said_of_the_next_sync() -> None:
    [web1, _] = listing.build(inventory(), catalogue=None)

    assert (web1.disks[0].intent, web1.disks[0].last_point) == ("-", "")


def test_last_point_is_the_one_that_has_this_very_disk() -> None:
    [known, _] = listing.build(inventory(), catalogue=catalogue(vdi_uuid=uuid(2)))
    [replaced, _] = listing.build(inventory(), catalogue=catalogue(vdi_uuid=uuid(7)))

    assert known.disks[0].last_point == "20261122T020000Z"
    assert (replaced.disks[0].last_point, replaced.last_point) == ("", "20261122T020000Z")


def test_pattern_selects_vms_and_leaves_detached_disks_out() -> None:
    [row] = listing.build(inventory(), catalogue=None, patterns=["web*"])

    assert row.vm is not None
    with pytest.raises(errors.NotFound):
        listing.build(inventory(), catalogue=None, patterns=["none*"])


@pytest.mark.parametrize("text", [uuid(2), "web1/xvda", f"{uuid(1)}/xvda", "root"])
def test_disk_is_found_by_uuid_by_vm_and_device_and_by_name(text: str) -> None:
    assert listing.find_disk(inventory(), text).ref == "V"


@pytest.mark.parametrize("text", ["web1/xvdb", "web2/xvda", "nothing", "/"])
def test_disk_that_is_not_there_is_not_found(text: str) -> None:
    with pytest.raises(errors.NotFound):
        listing.find_disk(inventory(), text)


# ── Streams ──


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ("--version >&-", 0, ""),
        ("nosuch 2>&-", 2, ""),
        ("nosuch >&- 2>&-", 2, ""),
        ("--version >/dev/full", 1, "cbtfs: standard output cannot be written: No space left"),
        ("nosuch 2>/dev/full", 2, ""),
    ],
)
def test_streams_may_be_closed_or_full(words: str, status: int, told: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m cbtfs {words}"],
        check=False,
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stderr[: len(told)]) == (status, told)
    assert "Traceback" not in done.stderr


def test_traceback_drives_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    failures.report(errors.PoolError("VM '\x1b]0;mine\x07'"), verbosity=2)

    told = capsys.readouterr().err
    assert told.count("\\x1b]0;mine\\x07") == 2
    assert all(line.isprintable() for line in told.splitlines())
