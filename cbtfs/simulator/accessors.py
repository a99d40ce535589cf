"""The methods that every class has: ``get_record``, ``get_FIELD``, ``set_FIELD`` and so on."""

from collections.abc import Callable

from . import fields, volumes
from .failures import SimError
from .fields import Field
from .methods import Call, Handler, Method, parse
from .state import State
from .values import Record, Value

_HIDDEN = ("session",)  # classes whose objects cannot be listed


class Table(dict[str, Value]):
    """All records of a class, as ``get_all_records`` returns them; ``text`` is the same in JSON."""

    def __init__(self, records: Record, *, text: str) -> None:
        super().__init__(records)
        self.text = text


def find(name: str) -> Method | None:
    """Return the method of that name if it is one of those that every class has."""
    kind, _, verb = name.partition(".")
    if kind not in fields.CLASSES:
        return None
    made = _of_class(kind, verb) or _of_field(kind, verb)
    if made is None:
        return None
    spec, run = made
    return Method(name, parse(*spec), run, has_session=True, has_async=False)


Changer = Callable[[Call, str, str], Value]
Made = tuple[tuple[str, ...], Handler]


def _of_class(kind: str, verb: str) -> Made | None:
    if verb in ("get_all", "get_all_records") and kind in _HIDDEN:
        return None
    if verb == "get_by_name_label" and "name_label" not in fields.CLASSES[kind]:
        return None
    made = _OF_CLASS.get(verb)
    if made is None:
        return None
    spec, reader = made
    return tuple(item.format(kind) for item in spec), lambda call: reader(call, kind)


def _of_field(kind: str, verb: str) -> Made | None:
    known = fields.CLASSES[kind]
    if verb.startswith("get_") and verb[4:] in known:
        name = verb[4:]
        return (f"{kind} self",), lambda call: _get(call, kind, name)
    if verb.startswith("set_") and _writable(known, verb[4:]):
        name = verb[4:]
        return (f"{kind} self", "any value"), lambda call: _set(call, kind, known[name])
    for prefix, handler in _CHANGES.items():
        field = known.get(verb.removeprefix(prefix))
        if verb.startswith(prefix) and field is not None and field.writable:
            return _change(kind, field, prefix, handler)
    return None


def _writable(known: dict[str, Field], name: str) -> bool:
    return name in known and known[name].writable


def _change(kind: str, field: Field, prefix: str, handler: Changer) -> Made | None:
    of_map = prefix in ("add_to_", "remove_from_")
    if field.type != ("map" if of_map else "set"):
        return None
    spec = ["text key"] if of_map else ["text value"]
    if prefix == "add_to_":
        spec.append("text value")
    return (f"{kind} self", *spec), lambda call: handler(call, kind, field.name)


def _record(call: Call, kind: str) -> Value:
    with call.state.lock:
        _bring_up_to_date(call.state, kind)
        return dict(call.state.db.record(kind, call.text("self")))


def _by_uuid(call: Call, kind: str) -> Value:
    with call.state.lock:
        return call.state.db.by_uuid(kind, call.text("uuid"))


def _by_name(call: Call, kind: str) -> Value:
    label = call.text("label")
    with call.state.lock:
        records = call.state.db.records(kind).items()
        return [ref for ref, record in records if record["name_label"] == label]


def _all(call: Call, kind: str) -> Value:
    with call.state.lock:
        return list(call.state.db.records(kind))


def _all_records(call: Call, kind: str) -> Value:
    with call.state.lock:
        _bring_up_to_date(call.state, kind)
        records: Record = {r: dict(v) for r, v in call.state.db.records(kind).items()}
        return Table(records, text=call.state.db.json(kind))


def _bring_up_to_date(state: State, kind: str) -> None:
    """Set fields that follow something else than calls: guests' writes, a setting."""
    if kind == "VDI":
        volumes.measure_open(state)
    elif kind == "SR":
        for sr in state.db.records("SR"):
            volumes.measure_sr(state, sr)
    elif kind == "pool":
        restricted = "true" if state.faults.flag("licence.restrict_cbt") else "false"
        pool = state.db.only("pool")
        restrictions = state.db.mapping("pool", pool, "restrictions")
        state.db.set("pool", pool, restrictions=restrictions | {"restrict_cbt": restricted})


def _get(call: Call, kind: str, name: str) -> Value:
    with call.state.lock:
        return call.state.db.record(kind, call.text("self"))[name]


def _set(call: Call, kind: str, field: Field) -> Value:
    value = call.arguments["value"]
    if field.type == "int":
        value = call.number("value")
    elif not isinstance(value, _TYPES[field.type]):
        raise SimError("FIELD_TYPE_ERROR", field.name)
    with call.state.lock:
        call.state.db.set(kind, call.text("self"), **{field.name: value})
    return ""


def _add_to(call: Call, kind: str, name: str) -> Value:
    db, ref, key = call.state.db, call.text("self"), call.text("key")
    with call.state.lock:
        held = db.mapping(kind, ref, name)
        if key in held:
            raise SimError("MAP_DUPLICATE_KEY", kind, name, db.text(kind, ref, "uuid"), key)
        db.set(kind, ref, **{name: held | {key: call.text("value")}})
    return ""


def _remove_from(call: Call, kind: str, name: str) -> Value:
    db, ref = call.state.db, call.text("self")
    with call.state.lock:
        held = db.mapping(kind, ref, name)
        held.pop(call.text("key"), None)
        db.set(kind, ref, **{name: held})
    return ""


def _add(call: Call, kind: str, name: str) -> Value:
    db, ref, value = call.state.db, call.text("self"), call.text("value")
    with call.state.lock:
        held = db.refs(kind, ref, name)
        if value not in held:
            added: Value = [*held, value]
            db.set(kind, ref, **{name: added})
    return ""


def _remove(call: Call, kind: str, name: str) -> Value:
    db, ref, value = call.state.db, call.text("self"), call.text("value")
    with call.state.lock:
        held = db.refs(kind, ref, name)
        kept: Value = [item for item in held if item != value]
        db.set(kind, ref, **{name: kept})
    return ""


_OF_CLASS: dict[str, tuple[tuple[str, ...], Callable[[Call, str], Value]]] = {
    "get_record": (("{} self",), _record),
    "get_by_uuid": (("text uuid",), _by_uuid),
    "get_by_name_label": (("text label",), _by_name),
    "get_all": ((), _all),
    "get_all_records": ((), _all_records),
}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "bool": bool,
    "float": (int, float),
    "ref": str,
    "datetime": str,
    "set": list,
    "map": dict,
}
_CHANGES: dict[str, Changer] = {
    "add_to_": _add_to,
    "remove_from_": _remove_from,
    "add_": _add,
    "remove_": _remove,
}
