"""Certificates like the ones every xapi host makes for itself.

RSA-2048, self-signed, the host name as common name; the only extension is a subject alternative
name with the DNS names and the addresses of the *management* interface (xen-api,
ocaml/gencert/selfcert.ml). An address on a dedicated NBD network is therefore never in it, and
there is neither a key usage nor a basic constraint. Made once per directory by the ``openssl``
command, so that a restart of the pool shows the same certificates.
"""

import ssl
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cbtfs import errors

CIPHERS = "ECDHE-RSA-AES256-GCM-SHA384:ECDHE-RSA-AES128-GCM-SHA256"
"""The two suites of every xapi listener (xen-api, ocaml/xapi-consts/tls_policy.ml)."""

CURVE = "secp384r1"

_CONFIG = """\
[req]
distinguished_name = name
x509_extensions = extensions
prompt = no
string_mask = utf8only
[name]
CN = {hostname}
[extensions]
subjectAltName = {names}
subjectKeyIdentifier = none
authorityKeyIdentifier = none
"""


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a certificate names.

    Args:
        file: stem of the files, without suffix.
        hostnames: fully qualified; the first is the common name, and their first labels are
            named too.
        addresses: management addresses, IPv4 or IPv6.
    """

    file: str
    hostnames: tuple[str, ...]
    addresses: tuple[str, ...]

    @property
    def alternative_names(self) -> str:
        """The subject alternative names as openssl writes them."""
        names = [n for full in self.hostnames for n in (full, full.partition(".")[0])]
        named = [f"DNS:{name}" for name in dict.fromkeys(names)]
        return ",".join([*named, *(f"IP:{address}" for address in self.addresses)])


def certificate_path(directory: Path, name: str) -> Path:
    """Return the file of the PEM certificate called ``name``."""
    return directory / f"{name}.pem"


def key_path(directory: Path, name: str) -> Path:
    """Return the file of the private key called ``name``."""
    return directory / f"{name}.key"


def ensure(directory: Path, subjects: Sequence[Subject]) -> None:
    """Make the certificates that ``directory`` lacks, at the same time.

    Raises:
        CbtfsError: the ``openssl`` command is missing or failed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lacking = [s for s in subjects if not certificate_path(directory, s.file).exists()]
    _make(directory, [(subject.file, _request(directory, subject)) for subject in lacking])


def renew(directory: Path, name: str, context: ssl.SSLContext) -> str:
    """Make a new key and certificate of the same names; return the certificate as PEM.

    Whoever shakes hands by ``context`` sees it from now on; connections that are open stay.

    Raises:
        CbtfsError: the ``openssl`` command failed.
    """
    _make(directory, [(name, _openssl(directory, name))])
    certificate = certificate_path(directory, name)
    context.load_cert_chain(certificate, key_path(directory, name))
    return certificate.read_text(encoding="ascii")


def server_context(directory: Path, name: str) -> ssl.SSLContext:
    """Return a context as stunnel and xapi-nbd have it: TLS 1.2, two suites, one curve."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.set_ecdh_curve(CURVE)
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    context.load_cert_chain(certificate_path(directory, name), key_path(directory, name))
    return context


def _make(directory: Path, running: Sequence[tuple[str, subprocess.Popen[str]]]) -> None:
    failures: list[str] = []
    for name, process in running:
        _, complaint = process.communicate()
        if process.returncode:
            failures.append(complaint.strip().rpartition("\n")[2])
            continue
        key_path(directory, f"{name}.new").replace(key_path(directory, name))
        certificate_path(directory, f"{name}.new").replace(certificate_path(directory, name))
    if failures:
        raise errors.CbtfsError(f"openssl cannot make a certificate: {failures[0]}")


def _request(directory: Path, subject: Subject) -> subprocess.Popen[str]:
    config = directory / f"{subject.file}.cnf"
    config.write_text(
        _CONFIG.format(hostname=subject.hostnames[0], names=subject.alternative_names),
        encoding="utf-8",
    )
    return _openssl(directory, subject.file)


def _openssl(directory: Path, name: str) -> subprocess.Popen[str]:
    """Begin to make a certificate by the configuration that ``_request`` wrote."""
    config, key = directory / f"{name}.cnf", key_path(directory, f"{name}.new")
    key.touch(mode=0o600)
    command = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-sha256"),
        *("-days", "3650", "-config", str(config), "-keyout", str(key)),
        *("-out", str(certificate_path(directory, f"{name}.new"))),
    ]
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise errors.CbtfsError(
            "the simulated pool needs the openssl command; install the package openssl"
        ) from None
