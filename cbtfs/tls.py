"""Verified TLS: whom to believe, and a verified channel in front of libnbd."""

import ssl


def pin(pem: str) -> ssl.SSLContext:
    """Return a context that trusts exactly the certificate ``pem``, whatever its names."""
    raise NotImplementedError


def ca(ca_file: str = "") -> ssl.SSLContext:
    """Return a context that trusts the certificates in ``ca_file``, or the system's."""
    raise NotImplementedError


def fingerprint(certificate: str | bytes) -> str:
    """Return ``sha256:HEX`` of a certificate in PEM or DER."""
    raise NotImplementedError


async def fetch_certificate(host: str, port: int) -> str:
    """Return the certificate of ``host`` as PEM, unverified: a handshake, not a byte of data."""
    raise NotImplementedError
