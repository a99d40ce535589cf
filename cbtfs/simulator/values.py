"""Values of xapi's records and how each of its two encodings writes them.

======== ========================================= ====================
type     XML-RPC                                   JSON
======== ========================================= ====================
int      ``<value>12</value>``: a string           ``12``
bool     ``<boolean>1</boolean>``                  ``true``
float    ``<double>0.5</double>``                  ``0.5``
datetime ``<dateTime.iso8601>``                    a string
string   ``<value>text</value>``                   a string
set, map ``<array>``, ``<struct>``                 list, object
void     ``<value></value>``                       ``""``
======== ========================================= ====================

(xen-api, doc/content/xen-api/wire-protocol.md; ocaml-rpc, src/lib/xmlrpc.ml.)
"""

import re
from datetime import UTC, datetime
from xml.sax import saxutils

Value = bool | int | float | str | list["Value"] | dict[str, "Value"]
Record = dict[str, Value]

NULL = "OpaqueRef:NULL"


class Timestamp(str):
    """A point in time as xapi writes it: ``20240101T00:00:00Z``."""

    __slots__ = ()

    @classmethod
    def of(cls, moment: datetime) -> "Timestamp":
        """Return ``moment``, which is in UTC, to the second."""
        return cls(moment.strftime("%Y%m%dT%H:%M:%SZ"))

    @classmethod
    def now(cls) -> "Timestamp":
        """Return the present."""
        return cls.of(datetime.now(UTC))

    def moment(self) -> datetime:
        """Return the same as a datetime in UTC."""
        return datetime.strptime(self, "%Y%m%dT%H:%M:%SZ").replace(tzinfo=UTC)


class TypedInt(int):
    """An int that XML-RPC carries typed, as ``valid_ref_counts`` of ``event.from`` does."""

    __slots__ = ()


EPOCH = Timestamp("19700101T00:00:00Z")

# What XML 1.0 cannot hold; xapi's own database refuses it, a hostile peer's need not.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def xml(value: Value) -> str:
    """Return ``value`` as an XML-RPC ``<value>`` element."""
    parts: list[str] = []
    _append(parts, value)
    return "".join(parts)


def escape(text: str) -> str:
    """Return ``text`` for XML; characters that XML cannot hold become U+FFFD."""
    if text.isalnum():
        return text
    return saxutils.escape(_NOT_XML.sub("\ufffd", text))


def _append(parts: list[str], value: Value) -> None:
    match value:
        case list():
            parts.append("<value><array><data>")
            for item in value:
                _append(parts, item)
            parts.append("</data></array></value>")
        case dict():
            parts.append("<value><struct>")
            for name, item in value.items():
                parts.append(f"<member><name>{escape(name)}</name>")
                _append(parts, item)
                parts.append("</member>")
            parts.append("</struct></value>")
        case _:
            parts.append(f"<value>{_scalar(value)}</value>")


def _scalar(value: bool | float | str) -> str:  # noqa: PLR0911 (a table, one row a type)
    match value:
        case bool():
            return f"<boolean>{int(value)}</boolean>"
        case TypedInt():
            return f"<i4>{int(value)}</i4>"
        case int():
            return str(value)
        case float():
            return f"<double>{value:.16g}</double>"
        case Timestamp():
            return f"<dateTime.iso8601>{value}</dateTime.iso8601>"
        case _:
            return escape(value)
