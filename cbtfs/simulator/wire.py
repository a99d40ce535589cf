"""Requests and replies of the API: XML-RPC, and JSON-RPC versions 1 and 2, bytes to bytes."""

import json
from dataclasses import dataclass
from typing import cast
from xml.parsers.expat import ExpatError
from xmlrpc import client as xmlrpc

from . import values
from .accessors import Table
from .failures import SimError
from .values import Timestamp, Value

XML, JSON_1, JSON_2 = "xml", "json1", "json2"


class Malformed(Exception):
    """A body that is no request: HTTP 500, not a failure of the API."""


@dataclass(frozen=True)
class Request:
    """A call as it came; ``form`` says how to answer it."""

    form: str
    method: str
    params: list[Value]
    id: Value | None = None

    @property
    def content_type(self) -> str:
        """The media type of the reply."""
        return "text/xml" if self.form == XML else "application/json"


def decode(path: str, body: bytes) -> Request:
    """Return the request in ``body``.

    Raises:
        Malformed: it is none; JSON without an ``id`` is none either.
    """
    if path.rstrip("/") in ("/json", "/jsonrpc"):
        return _decode_json(body)
    return _decode_xml(body)


def success(request: Request, value: Value) -> bytes:
    """Return the reply that carries ``value``."""
    if request.form == XML:
        result = values.xml({"Status": "Success", "Value": value})
        return _method_response(result)
    text = value.text if isinstance(value, Table) else json.dumps(value, check_circular=False)
    identity = json.dumps(request.id)
    if request.form == JSON_2:
        return f'{{"jsonrpc":"2.0","result":{text},"id":{identity}}}'.encode()
    return f'{{"result":{text},"error":null,"id":{identity}}}'.encode()


def failure(request: Request, error: SimError) -> bytes:
    """Return the reply that carries a failure; in JSON-RPC 2 the code is not among the data."""
    code, params = error.code, list(error.params)
    if request.form == XML:
        description: list[Value] = [code, *params]
        return _method_response(values.xml({"Status": "Failure", "ErrorDescription": description}))
    reply: dict[str, object]
    if request.form == JSON_2:
        described = {"code": 1, "message": code, "data": params}
        reply = {"jsonrpc": "2.0", "error": described, "id": request.id}
    else:
        reply = {"result": None, "error": [code, *params], "id": request.id}
    return json.dumps(reply).encode()


def _method_response(value: str) -> bytes:
    text = (
        '<?xml version="1.0"?><methodResponse><params><param>'
        f"{value}</param></params></methodResponse>"
    )
    return text.encode("utf-8", "replace")


def _decode_xml(body: bytes) -> Request:
    try:
        params, method = xmlrpc.loads(body)
    except (ExpatError, xmlrpc.Error, ValueError, TypeError, UnicodeError) as error:
        raise Malformed(f"not an XML-RPC request: {error}") from error
    if method is None:
        raise Malformed("not an XML-RPC request: no method name")
    return Request(XML, method, [_value(param) for param in params])


def _decode_json(body: bytes) -> Request:
    try:
        request = cast(object, json.loads(body))
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {error}") from error
    if not isinstance(request, dict) or "id" not in request:
        raise Malformed("Malformed_method_request: no id")
    fields = _members(cast(dict[object, object], request))
    method, params = fields.get("method"), fields.get("params", [])
    if not isinstance(method, str) or not isinstance(params, list):
        raise Malformed("Malformed_method_request: no method or params")
    form = JSON_2 if fields.get("jsonrpc") == "2.0" else JSON_1
    return Request(form, method, params, id=fields["id"])


def _members(items: dict[object, object]) -> dict[str, Value]:
    return {str(name): _value(part) for name, part in items.items()}


def _value(item: object) -> Value:
    """Return what a decoder gave as a value of the API."""
    match item:
        case bool() | int() | float() | str():
            return item
        case None:
            return ""
        case list() | tuple():
            return [_value(part) for part in cast(list[object], item)]
        case dict():
            return _members(cast(dict[object, object], item))
        case xmlrpc.DateTime():
            return Timestamp(item.value)
        case _:
            raise Malformed(f"a value of type {type(item).__name__} has no place here")
