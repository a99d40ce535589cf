"""``sim``: a simulated pool to try cbtfs on; it speaks the wires of a real one."""

from collections.abc import Mapping
from typing import Annotated

import msgspec
import typer

from cbtfs import errors
from cbtfs.simulator import faults, life

from . import context as contexts, output
from .output import Table

Directory = Annotated[str, typer.Argument(metavar="DIR", help="Where the pool lives.")]

group = typer.Typer(
    name="sim",
    help="A simulated pool to try things on: real wires, no Xen.",
    epilog="Example: cbtfs sim start /tmp/pool && cbtfs --config /tmp/pool/cbtfs.toml ls",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.add_typer(group)


@group.command("start", epilog="Example: cbtfs sim start /tmp/pool --scenario large")
def start(
    context: typer.Context,
    directory: Directory,
    *,
    scenario: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="What a new pool holds: default, large, huge, speed, empty."
        ),
    ] = "default",
    foreground: Annotated[
        bool,
        typer.Option("-f", "--foreground", metavar="", help="Stay in the foreground until Ctrl-C."),
    ] = False,
) -> None:
    """Start a pool in DIR; return when it answers. An existing one goes on where it was."""
    options = contexts.of(context)
    if foreground:
        life.become(directory, scenario=scenario)
    status = life.start(directory, scenario=scenario)
    if options.json:
        output.document(status)
        return
    output.line(f"a simulated pool runs at {status.get('url', '?')}; try:")
    output.line(f"  cbtfs --config {output.safe(directory)}/cbtfs.toml ls")


@group.command("set", epilog="Example: cbtfs sim set /tmp/pool nbd.delay=2ms nbd.drop_after=10M")
def set_values(
    directory: Directory,
    values: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="KEY= sets it back.")
    ] = None,
) -> None:
    """Make the pool awkward: delays, failures, dropped connections. Without KEY: list all keys."""
    if values:
        life.set_values(directory, _pairs(values))
        return
    table = Table(["KEY", "KIND", "DEFAULT", "MEANING"], flexible=(3,))
    for name, key in faults.KEYS.items():
        table.add(name, key.kind, key.default or "-", key.meaning)
    table.print()


def _pairs(values: list[str]) -> Mapping[str, str]:
    pairs: dict[str, str] = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise errors.UsageError(
                f"{text!r} is no setting; write KEY=VALUE, such as nbd.delay=2ms"
            )
        pairs[key] = value
    return pairs


@group.command("stop", epilog="Example: cbtfs sim stop /tmp/pool")
def stop(context: typer.Context, directory: Directory) -> None:
    """Stop the pool in DIR; its disks stay for the next start."""
    if not life.stop(directory):
        contexts.of(context).tell(f"no simulated pool runs in {directory}")


@group.command("status", epilog="Example: cbtfs sim status /tmp/pool")
def status(context: typer.Context, directory: Directory) -> None:
    """Show what runs in DIR: url, hosts, settings in force."""
    found = life.status(directory)
    if contexts.of(context).json:
        output.document(found)
        return
    for key, value in found.items():
        output.line(f"{key + ':':<12}{output.safe(_text(value))}")


def _text(value: object) -> str:
    if isinstance(value, dict):
        pairs = msgspec.convert(value, dict[str, object])
        return "; ".join(f"{key} {_text(inner)}" for key, inner in pairs.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, msgspec.convert(value, list[object]))) or "-"
    return str(value)
