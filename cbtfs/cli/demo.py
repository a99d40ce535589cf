"""``demo``: placeholder while the rest is being built."""

import typer


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
