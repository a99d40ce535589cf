"""A Linux that boots from a disk of the pool, runs while it is backed up, and boots again restored.

::

    made with mkfs.ext4, extlinux   ──>  the disk of a VM of the simulated pool
                                            │   boots by its own loader over NBD, and writes
    point 1  <── sync ── as it was made     │
    point 2  <── sync ── while it runs      │
        │
        ├── restored to a file              boots
        ├── the file served by qemu-nbd     boots
        └── the store's image by nbdkit     boots

Each boot tells on its serial console how often the disk was booted, as its files say, and a digest
of all its files; then it writes, and tells the digest again. What a boot leaves is what the next of
the same disk, or of a copy of it, has to find. Nothing is written to what was restored.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cbtfs import units

from .commands import Shell
from .simulated import RunningPool
from .smallvm import running_small

SIZE = 256 * units.MiB
START = units.MiB
LIMIT = 300
"""Seconds for a boot, of which it takes a tenth on an idle machine."""

PROGRAMS = ("sh", "cat", "dd", "find", "mkdir", "mount", "sha256sum", "sort", "sync", "xargs")
PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-nbd": "qemu-utils",
    "nbdkit": "nbdkit",
    "nbdcopy": "libnbd-bin",
    "extlinux": "extlinux",
    "mkfs.ext4": "e2fsprogs",
    "sfdisk": "fdisk",
}
BOOT_RECORD = (Path("/usr/lib/EXTLINUX/mbr.bin"), Path("/usr/lib/syslinux/mbr/mbr.bin"))

INIT = """#!/bin/sh
PATH=/bin
exec </dev/console >/dev/console 2>&1
mount -t proc proc /proc
digest() {
    find / -xdev -type f ! -path '/proc/*' ! -path '/dev/*' | sort | xargs sha256sum | sha256sum
}
read -r times </srv/times
echo "boot-restored: found $times $(digest)"
echo $((times + 1)) >/srv/times
dd if=/dev/urandom of=/srv/boot-$times bs=64k count=40 2>/dev/null
echo "boot $times" >>/srv/log
sync
echo "boot-restored: left $((times + 1)) $(digest)"
read -r word
echo o >/proc/sysrq-trigger
while :; do read -r word; done
"""
"""Waits for a line before it powers off: so long the file system is mounted, its journal in use."""

LOADER = """SERIAL 0 115200
DEFAULT linux
LABEL linux
    LINUX /boot/vmlinuz
    INITRD /boot/initrd.img
    APPEND root=/dev/vda1 rw init=/init console=ttyS0 quiet panic=-1
"""


class Failed(Exception):
    """Something is not as it has to be; the text says what."""


@dataclass(frozen=True)
class Boot:
    """What a boot told: how often the disk had been booted, and its files' digest, twice."""

    found: str
    left: str
    seconds: float


def main() -> int:
    """Run all of it; return the exit status."""
    try:
        kernel = _kernel()
        with tempfile.TemporaryDirectory(prefix="cbtfs-boot-") as folder:
            _run(Path(folder), kernel)
    except Failed as exc:
        sys.stderr.write(f"boot-restored: {exc}\n")
        return 1
    return 0


def _run(folder: Path, kernel: str) -> None:
    disk = _made(folder, kernel)
    _say(f"kernel {kernel}; disk of {SIZE // units.MiB} MiB, bootable by extlinux")
    with running_small(folder / "pool", sizes=(SIZE,)) as small:
        shell = Shell(small.pool, folder / "store")
        _system("nbdcopy", disk, small.pool.guest("v", "xvda"))
        _told("synced as it was made", shell.sync("v")["xvda"])
        original = _original(small.pool, shell)
        restored = folder / "restored.raw"
        shell.run("restore", "v/latest/xvda", "--to", str(restored))
        first = folder / "first.raw"
        shell.run("restore", "v/latest~1/xvda", "--to", str(first))
        boots = {"the restored file": _boot_file(restored)}
        with _qemu_nbd(folder, restored) as uri:
            boots["qemu-nbd, the restored file"] = _boot(uri, snapshot=True)
        with _nbdkit(folder, shell.image("v", "xvda")) as uri:
            boots["nbdkit, the store's image"] = _boot(uri, snapshot=True)
        before = _boot_file(first)
        shell.run("verify", "v/latest")
    for name, boot in boots.items():
        _row(name, boot)
    _row("the point before, restored", before)
    wrong = [name for name, boot in boots.items() if boot.found != original.left]
    if wrong or before.found != original.found:
        raise Failed(f"other files than the original had: {', '.join(wrong) or 'the point before'}")
    _say("every copy booted and found the files that the original had left; verify: as recorded")


def _original(pool: RunningPool, shell: Shell) -> Boot:
    """Boot the disk in the pool, and sync it as it runs."""
    with _machine(f"file.driver=nbd,file.server.type=unix,file.server.path="
                  f"{pool.guest_socket('v', 'xvda')},cache=none", snapshot=False) as machine:  # fmt: skip
        boot = machine.told()
        _row("the original, in the pool", boot)
        _told("synced while it runs", shell.sync("v")["xvda"])
        machine.power_off()
    return boot


# ── Machines ─────────────────────────────────────────────────────────────────────────────────


@dataclass
class Machine:
    """A virtual machine that boots; if it does not, the last of its console says why."""

    process: "subprocess.Popen[str]"
    begin: float

    def told(self) -> Boot:
        """Wait until it has told both of its lines."""
        found = self._line("boot-restored: found ")
        left = self._line("boot-restored: left ")
        return Boot(found, left, time.monotonic() - self.begin)

    def power_off(self) -> None:
        """Let it end, and wait for that."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        if self.process.wait(LIMIT) != 0:
            raise Failed(f"qemu ended with status {self.process.returncode}")

    def _line(self, beginning: str) -> str:
        console: IO[str] | None = self.process.stdout
        assert console is not None
        seen: list[str] = []
        for line in console:
            _, found, rest = line.partition(beginning)
            if found:
                times, digest, *_ = rest.split()
                return f"{times} {digest[:16]}"
            seen.append(line)
        raise Failed(f"it did not boot; the last of its console:\n{''.join(seen[-20:])}")


@contextlib.contextmanager
def _machine(drive: str, *, snapshot: bool) -> Iterator[Machine]:
    drive += ",format=raw,if=virtio" + (",snapshot=on" if snapshot else "")
    # emulated: KVM is not everywhere, and where it is nested it may not know the loader's real mode
    words = [
        *("qemu-system-x86_64", "-accel", "tcg", "-m", "512", "-cpu", "max", "-drive", drive),
        *("-display", "none", "-serial", "stdio", "-monitor", "none", "-nic", "none", "-no-reboot"),
    ]
    begin = time.monotonic()
    with subprocess.Popen(
        ["timeout", str(LIMIT), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            yield Machine(process, begin)
        finally:
            process.terminate()


def _boot(drive: str, *, snapshot: bool) -> Boot:
    with _machine(drive, snapshot=snapshot) as machine:
        boot = machine.told()
        machine.power_off()
    return boot


def _boot_file(path: Path) -> Boot:
    return _boot(f"file={path}", snapshot=True)


@contextlib.contextmanager
def _qemu_nbd(folder: Path, image: Path) -> Iterator[str]:
    words = ["qemu-nbd", "--read-only", "--format=raw", "--persistent", "--shared=4"]
    with _served(folder / "qemu.sock", [*words, f"--socket={folder}/qemu.sock", str(image)]) as uri:
        yield uri


@contextlib.contextmanager
def _nbdkit(folder: Path, image: Path) -> Iterator[str]:
    words = ["nbdkit", "-f", "-r", "-U", f"{folder}/nbdkit.sock", "file", str(image)]
    with _served(folder / "nbdkit.sock", words) as uri:
        yield uri


@contextlib.contextmanager
def _served(socket: Path, words: Sequence[str]) -> Iterator[str]:
    with subprocess.Popen(words) as server:
        try:
            _await(socket, server, words[0])
            yield f"file=nbd+unix:///?socket={socket}"
        finally:
            server.terminate()


def _await(socket: Path, server: "subprocess.Popen[bytes]", name: str) -> None:
    while not socket.is_socket():
        if server.poll() is not None:
            raise Failed(f"{name} did not start")
        time.sleep(0.05)


# ── The disk ─────────────────────────────────────────────────────────────────────────────────


def _kernel() -> str:
    """Return the version of a kernel of this machine, if everything else is there, too."""
    missing = [package for tool, package in PACKAGES.items() if not shutil.which(tool, path=_PATH)]
    if missing or not any(path.exists() for path in BOOT_RECORD):
        raise Failed(f"install the packages: {' '.join(missing or ['extlinux'])}")
    if os.geteuid() != 0:
        raise Failed("needs root, to mount the disk that it makes")
    wanted = os.environ.get("KERNEL", "*")
    found = [
        path.name.removeprefix("vmlinuz-")
        for path in sorted(Path("/boot").glob(f"vmlinuz-{wanted}"))
        if path.with_name(path.name.replace("vmlinuz-", "initrd.img-")).exists()
    ]
    if not found:
        raise Failed("needs a kernel with its initrd in /boot; install linux-image-cloud-amd64")
    return found[-1]


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _made(folder: Path, kernel: str) -> Path:
    """Make a disk with one partition that boots this machine's kernel."""
    root = folder / "root"
    for name in ("bin", "boot/extlinux", "dev", "proc", "run", "srv", "sys"):
        (root / name).mkdir(parents=True)
    for program in PROGRAMS:
        _take_program(root, program)
    shutil.copy(f"/boot/vmlinuz-{kernel}", root / "boot/vmlinuz")
    shutil.copy(f"/boot/initrd.img-{kernel}", root / "boot/initrd.img")
    (root / "boot/extlinux/extlinux.conf").write_text(LOADER)
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    (root / "srv/times").write_text("0\n")
    (root / "srv/random").write_bytes(os.urandom(8 * units.MiB))
    part, disk = folder / "part", folder / "disk.raw"
    part.touch()
    os.truncate(part, SIZE - START)
    # extlinux reads neither 64bit nor checksums, and fails with blocks of 1 KiB
    _system("mkfs.ext4", "-q", "-b", "4096", "-O", "^64bit,^metadata_csum", "-d", root, part)
    place = folder / "place"
    place.mkdir()
    _system("mount", "-o", "loop", part, place)
    try:
        _system("extlinux", "--install", place / "boot/extlinux")
    finally:
        _system("umount", place)
    disk.touch()
    os.truncate(disk, SIZE)
    _system("sfdisk", "-q", disk, given="label: dos\nstart=2048, type=83, bootable\n")
    record = next(path for path in BOOT_RECORD if path.exists())
    _system("dd", f"if={record}", f"of={disk}", "bs=440", "count=1", "conv=notrunc", "status=none")
    _system(
        "dd", f"if={part}", f"of={disk}", "bs=1M", "seek=1", "conv=notrunc,sparse", "status=none"
    )
    return disk


def _take_program(root: Path, name: str) -> None:
    """Copy a program of this machine with the libraries that it wants."""
    source = Path(shutil.which(name, path="/usr/bin:/bin") or "").resolve()
    shutil.copy(source, root / "bin" / name)
    for word in _system("ldd", source).split():
        if word.startswith("/"):
            target = root / word[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(word, target)


def _system(*words: str | Path, given: str = "") -> str:
    done = subprocess.run(
        list(map(str, words)),
        input=given,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": _PATH},
        check=False,
    )
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout


# ── What is told ─────────────────────────────────────────────────────────────────────────────


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _told(what: str, disk: dict[str, object]) -> None:
    _say(f"{what}: {disk['method']}, {int(str(disk['bytes_written'])) // units.KiB} KiB written")


def _row(name: str, boot: Boot) -> None:
    _say(f"{name:30} found {boot.found}  left {boot.left}  in {boot.seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
