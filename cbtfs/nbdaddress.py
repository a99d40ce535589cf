"""Address and patience: where an export is, and how long its host may be silent."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class NbdAddress:
    """Where one VDI is exported, as ``VDI.get_nbd_info`` tells it.

    ``export_name`` is a credential (it contains the session), so neither it nor the certificate
    shows in ``repr``. ``tls`` follows the purpose of the network, never the answer of the host.
    """

    host: str
    port: int
    export_name: str = field(repr=False)
    cert_pem: str = field(default="", repr=False)
    subject: str = ""
    tls: bool = True

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long, in seconds, a host may be silent before its connection counts as lost."""

    connect: float = 60.0
    """Until the disk can be read: attaching it in dom0 takes seconds, more when the SR is busy."""

    request: float = 60.0
    """Without a byte while an answer is due."""

    close: float = 30.0
    """Until the host has detached the disk and ended the connection."""
