# The part of XenAPI.py that cbtfs relies on: a ServerProxy whose methods answer xapi's raw struct.
import xmlrpc.client

class Failure(Exception):
    details: list[str]

class Session(xmlrpc.client.ServerProxy):
    def __init__(
        self,
        uri: str,
        transport: xmlrpc.client.Transport | None = None,
        encoding: str | None = None,
        verbose: bool = False,
        allow_none: bool = True,
        ignore_ssl: bool = False,
    ) -> None: ...
