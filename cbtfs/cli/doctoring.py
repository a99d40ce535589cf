"""``doctor``: what works, what does not, and what helps."""

import trio
import typer

from cbtfs import doctor as checks, errors
from cbtfs.doctor import Finding

from . import context as contexts, output, running
from .context import Globals

_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.command("doctor", epilog="Example: cbtfs --config /etc/cbtfs/cbtfs.toml doctor")(doctor)


def doctor(context: typer.Context) -> None:
    """Check machine, store and pool; exit status 1 if something cannot work."""
    options = contexts.of(context)
    findings = checks.machine()
    path = options.store_path()
    if path is None:
        findings.append(
            Finding("store", "warn", "none is configured", "use --store DIR or CBTFS_STORE")
        )
    else:
        findings += checks.store(path)
    found, status = running.run(lambda: _pool(options))
    findings += found
    _show(options, findings)
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(status or 1)


async def _pool(options: Globals) -> tuple[list[Finding], int]:
    """Return what there is to say about the pool, and the exit status if it cannot be had."""
    try:
        async with contexts.opened_pool(options) as pool:
            inventory = await pool.inventory()
    except errors.CbtfsError as exc:
        return [Finding("pool", "fail", str(exc))], exc.exit_code
    login = Finding(
        "pool", "ok", f"{inventory.pool.name or 'unnamed'}: certificate and login accepted"
    )
    return [login, *await trio.to_thread.run_sync(checks.pool, inventory)], 0


def _show(options: Globals, findings: list[Finding]) -> None:
    if options.json:
        output.document(
            {
                "findings": [
                    {"name": f.name, "level": f.level, "detail": f.detail, "remedy": f.remedy}
                    for f in findings
                ]
            }
        )
        return
    for finding in findings:
        output.line(
            f"{_MARKS[finding.level]}  {output.safe(finding.name)}: {output.safe(finding.detail)}"
        )
        if finding.remedy and finding.level != "ok":
            output.line(f"      {output.safe(finding.remedy)}")
