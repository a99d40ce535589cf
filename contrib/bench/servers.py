"""The servers that contrib/bench/sync and mount read from, and the place that sync copies to."""

import datetime as dt
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import blake3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from cbtfs.image import reflink_supported

NAME = "xcp1.bench"
_STEP = 64 << 20
_PATIENCE = 60.0

# one request at a time on each connection, connections beside each other; no multi-conn, no extents
_LIKE_XAPI_NBD = [
    "--filter=multi-conn",
    "--filter=noextents",
    "--filter=noparallel",
    "--filter=delay",
]
_LIKE_XAPI_NBD_SETTINGS = ["multi-conn-mode=disable", "serialize=requests", "rdelay=2ms"]


@dataclass(frozen=True)
class Kind:
    """A server to measure with.

    Attributes:
        what: what it is, for the reader of the figures.
        serial: imitates xapi-nbd.
        tls: both sides verify its certificate.
        peers: name and options of the nbdcopy runs.
    """

    what: str
    serial: bool
    tls: bool
    peers: dict[str, list[str]]


_DEFAULT: dict[str, list[str]] = {"nbdcopy": []}
_BOTH = _DEFAULT | {"nbdcopy 4M": ["--request-size=4194304"]}

KINDS = {
    "file": Kind("nbdkit, a file in the page cache", False, False, _DEFAULT),
    "serial": Kind("nbdkit like xapi-nbd: serial connections, 2 ms a request", True, False, _BOTH),
    "file-tls": Kind("nbdkit, a file in the page cache, over TLS", False, True, _DEFAULT),
    "serial-tls": Kind("nbdkit like xapi-nbd, over TLS", True, True, _BOTH),
}


@contextmanager
def xfs_directory(directory: Path, *, room: int) -> Iterator[tuple[Path, str]]:
    """Yield a directory on XFS (or btrfs), with a word on what it is; makes one where it can.

    Args:
        directory: where to put it.
        room: bytes that must fit in.
    """
    if reflink_supported(directory):
        yield directory, "as it is"
        return
    if os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
        yield directory, "no XFS: as another user than root, it cannot be mounted here"
        return
    image, mounted = directory / "xfs.img", directory / "xfs"
    mounted.mkdir()
    # written once: where the file below grows, the first writer of each run would pay for that
    with image.open("wb") as file:
        zeros = bytes(_STEP)
        for _ in range(0, room, _STEP):
            file.write(zeros)
    os.sync()
    run("mkfs.xfs", "-q", "-m", "reflink=1", str(image))
    # past the cache of the file system below, so that what is measured is one file system on a disk
    attach = ["losetup", "--find", "--show", "--direct-io=on", str(image)]
    device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    try:
        run("mount", device, str(mounted))
        try:
            yield mounted, "XFS in a loop device with direct I/O"
        finally:
            run("umount", str(mounted))
    finally:
        run("losetup", "-d", device)
        image.unlink()


def make_disk(path: Path, *, size: int) -> None:
    """Write ``size`` bytes that do not compress, and leave them in the page cache."""
    stream = blake3.blake3(b"contrib/bench/sync")
    with path.open("wb") as file:
        for at in range(0, size, _STEP):
            file.write(stream.digest(length=min(_STEP, size - at), seek=at))
        file.flush()
        os.fsync(file.fileno())


def make_certificate(directory: Path) -> str:
    """Make a certificate as xapi does, self-signed, for nbdkit and nbdcopy; return it as PEM."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    names = [x509.DNSName(NAME), x509.DNSName("localhost")]
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([*names, address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM).decode()
    (directory / "server-cert.pem").write_text(pem)
    (directory / "ca-cert.pem").write_text(pem)
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    (directory / "server-key.pem").write_bytes(secret)
    return pem


@dataclass(frozen=True)
class Server:
    """A running nbdkit."""

    port: int
    pid: int


@contextmanager
def nbdkit(kind: Kind, disk: Path, *, pki: Path) -> Iterator[Server]:
    """Serve ``disk`` on 127.0.0.1; the files of a folder, as exports of their names."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = int(sock.getsockname()[1])
    pidfile = pki / "nbdkit.pid"
    pidfile.unlink(missing_ok=True)
    command = ["nbdkit", "-f", "-r", "-i", "127.0.0.1", "-p", str(port), "-P", str(pidfile)]
    command += ["--tls=require", f"--tls-certificates={pki}"] if kind.tls else ["--tls=off"]
    command += _LIKE_XAPI_NBD if kind.serial else []
    source = f"dir={disk}" if disk.is_dir() else str(disk)
    command += ["file", source, *(_LIKE_XAPI_NBD_SETTINGS if kind.serial else [])]
    server = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + _PATIENCE
        while not pidfile.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit("nbdkit does not start; see above")
            time.sleep(0.01)
        yield Server(port, server.pid)
    finally:
        server.terminate()
        server.wait()


def run(*command: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True)
