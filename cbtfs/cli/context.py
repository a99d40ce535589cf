"""Context: the global options of one call, and what they open: a configuration, a pool, a store."""

import logging
import os
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from cbtfs import config, errors, pool, progress, store as stores
from cbtfs.catalogue import Catalogue, Reference
from cbtfs.config import Config
from cbtfs.pool import Pool
from cbtfs.store import Store

from . import output

log = logging.getLogger("cbtfs.cli")

_T = TypeVar("_T")


DryRun = Annotated[
    bool,
    typer.Option("-n", "--dry-run", metavar="", help="Only print what would be done, and why."),
]
"""Option of every verb that deletes or overwrites."""

JsonProgress = Annotated[
    bool,
    typer.Option("--json-progress", metavar="", help="Progress as lines of JSON on stderr."),
]
"""Option of every verb that takes long."""


@dataclass(frozen=True, slots=True)
class Globals:
    """The options before the verb.

    Attributes:
        config: ``--config FILE``.
        pool: ``--pool NAME``.
        store: ``--store NAME|DIR``.
        verbosity: number of ``-v``; -1 for ``-q``.
        json: whether results are one JSON document.
        environ: the environment when the program began.
    """

    config: str | None = None
    pool: str | None = None
    store: str | None = None
    verbosity: int = 0
    json: bool = False
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)

    @property
    def quiet(self) -> bool:
        """Whether only results and errors are printed."""
        return self.verbosity < 0

    def config_path(self) -> Path | None:
        """Return the configuration file in use, or None."""
        return config.find(self.config, self.environ)

    def configuration(self) -> Config:
        """Return the configuration in use."""
        return config.load(self.config_path())

    def store_path(self) -> Path | None:
        """Return the directory of the store, or None if none is configured."""
        return config.choose_store(self.configuration(), self.store, environ=self.environ)

    def tell(self, text: str) -> None:
        """Print a sentence to stderr unless ``-q``."""
        if not self.quiet:
            output.note(text)


def of(context: typer.Context) -> Globals:
    """Return the global options that ``context`` carries."""
    found = context.find_object(Globals)
    return found if found is not None else Globals()


def warn(text: str) -> None:
    """Print a warning to stderr, unless ``-q``, through the log."""
    log.warning("%s", text)


def parsed(option: str, parse: Callable[[str], _T], text: str) -> _T:
    """Return what ``text`` means to ``parse``, a mistake in it with the name of the option."""
    try:
        return parse(text)
    except errors.UsageError as exc:
        raise errors.UsageError(f"{option}: {exc}") from None


def progress_kind(options: Globals, *, as_json: bool) -> progress.Kind:
    """Return how to tell of progress on stderr; ``as_json`` is ``--json-progress``."""
    if as_json:
        return "json"
    return "silent" if options.quiet else progress.kind_for(sys.stderr)


@asynccontextmanager
async def opened_pool(options: Globals) -> AsyncGenerator[Pool]:
    """Yield the pool that options, environment and configuration choose, logged in."""
    chosen = config.choose_pool(options.configuration(), options.pool, environ=options.environ)
    settings = config.pool_options(chosen, environ=options.environ, warn=warn)
    async with pool.open_pool(settings) as opened:
        yield opened


@contextmanager
def opened_store(options: Globals, *, create: bool = False) -> Generator[Store]:
    """Yield the store that options, environment and configuration choose.

    Raises:
        UsageError: none is chosen.
        StoreError: it cannot be opened; unless ``create`` also if it does not exist yet.
    """
    path = options.store_path()
    if path is None:
        raise errors.UsageError(
            "no store is configured; use --store DIR, CBTFS_STORE or [store.NAME] in the"
            " configuration"
        )
    with stores.open_store(path, create=create) as opened:
        yield opened


@contextmanager
def store_if_any(options: Globals) -> Generator[Store | None]:
    """Yield the chosen store, or None if none is chosen or nothing is in it yet."""
    path = options.store_path()
    if path is None or not stores.is_store(path):
        yield None
        return
    with stores.open_store(path, create=False) as opened:
        yield opened


def catalogue_of(store: Store | None) -> Catalogue:
    """Return the restore points of a store; of none at all, none."""
    if store is None:
        return Catalogue({})
    found = store.catalogue()
    for problem in store.problems:
        warn(problem)
    return found


def point_of(store: Store, text: str) -> Reference:
    """Return what ``text`` names, to be used instead of what was lost.

    Raises:
        NotFound, UsageError: see ``Catalogue.resolve``.
        ImageDamaged: it is ``latest``, and a newer point is damaged: an older one must not pass for
            that.
    """
    reference = catalogue_of(store).resolve(text)
    history, found = reference.history, reference.point.time
    newer = [p for p in store.unlisted if p.vm_uuid == history.uuid and p.time > found]
    if newer and found not in text and "/latest" in text:
        raise errors.ImageDamaged(
            f"{text} would be {history.name}/{found}, but {newer[-1].time} is newer and damaged:"
            f" {newer[-1].why}; name the point that you want by its time"
        )
    return reference
