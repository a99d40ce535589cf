"""Anchor: the one certificate that libnbd is to trust when it does TLS itself.

libnbd can since 1.22, which lets us name the host whose socket it is given; before, it verifies
nothing then (see ``channel``). It reads its anchors from a directory, and only in the handshake.

It may only ever refuse what ``channel`` would accept, never the other way round: then that decides.
"""

import re
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from . import tls

_HOST_NAME = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def verifies(cert_pem: str, subject: str) -> bool:
    """Tell whether libnbd 1.22 verifies the owner of this certificate as strictly as ``channel``.

    A certificate of an authority is left to ``channel``: libnbd would accept whom it signed.

    Raises:
        PoolError: ``cert_pem`` is no certificate.
    """
    if not _HOST_NAME.fullmatch(subject):
        return False
    return tls.pin(cert_pem).cert_store_stats()["x509_ca"] == 0


@contextmanager
def anchored(cert_pem: str) -> Generator[str]:
    """Yield the directory for libnbd; it must exist until the handshake is over.

    Raises:
        OSError: there is no place for it.
    """
    with tempfile.TemporaryDirectory(prefix="cbtfs-anchor-") as directory:
        Path(directory, "ca-cert.pem").write_text(tls.first(cert_pem), encoding="ascii")
        yield directory
