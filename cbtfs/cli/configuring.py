"""``config``: is the configuration right, what does it come to, where is it."""

import json
from collections.abc import Mapping
from typing import NoReturn

import msgspec
import typer

from cbtfs import config, errors
from cbtfs.config import Config

from . import context as contexts, output
from .context import Globals

group = typer.Typer(
    name="config",
    help="Check and show the configuration.",
    epilog="Example: cbtfs --config /etc/cbtfs/cbtfs.toml config check",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.add_typer(group)


@group.command("check", epilog="Example: cbtfs --config new.toml config check")
def check(context: typer.Context) -> None:
    """Check the configuration; exit status 2 names the file and the key of a mistake."""
    options = contexts.of(context)
    found = _found(options)
    warnings = config.warnings(found)
    if options.json:
        output.document({"path": str(found.path), "warnings": warnings})
        return
    for sentence in warnings:
        output.line(f"warning: {output.safe(sentence)}")
    output.line(
        f"{output.safe(found.where)}: ok, {len(found.pools)} pools, {len(found.stores)} stores,"
        f" {len(found.jobs)} jobs"
    )


@group.command("show", epilog="Example: cbtfs config show")
def show(context: typer.Context) -> None:
    """Show every setting with its value, defaults included; secrets are named, never read."""
    found = _found(contexts.of(context))
    tables = {"pool": found.pools, "store": found.stores, "job": found.jobs}
    plain = {
        kind: {name: msgspec.to_builtins(table) for name, table in named.items()}
        for kind, named in tables.items()
    }
    if contexts.of(context).json:
        output.document({"path": str(found.path), **plain})
        return
    output.line(f"# {output.safe(found.where)}")
    for kind, named in plain.items():
        for name, values in named.items():
            output.line(f"\n[{kind}.{_key(name)}]\n{_settings(values)}")


def _settings(values: Mapping[str, object]) -> str:
    known = [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
    return "\n".join(known)


def _key(name: str) -> str:
    """Return a table's name as TOML has it; a string of JSON is one of TOML."""
    bare = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
    return name if bare else json.dumps(name)


def _toml(value: object) -> str:
    if isinstance(value, dict):
        table = msgspec.convert(value, dict[str, object])
        inner = ", ".join(f"{key} = {_toml(v)}" for key, v in table.items())
        return f"{{ {inner} }}"
    return json.dumps(value)


@group.command("path", epilog="Example: cbtfs config path")
def path(context: typer.Context) -> None:
    """Print the path of the configuration file in use."""
    options = contexts.of(context)
    found = options.config_path() or _missing()
    if options.json:
        output.document({"path": str(found)})
    else:
        output.line(output.safe(str(found)))


def _found(options: Globals) -> Config:
    """Return the configuration, of which there must be a file."""
    return config.load(options.config_path() or _missing())


def _missing() -> NoReturn:
    raise errors.ConfigError(
        f"no configuration file; looked for {config.SYSTEM_FILE} and {config.user_file()}"
    )
