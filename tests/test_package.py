"""The package as a whole: its parts are documented and in layers, what the README says works."""

import ast
import importlib
import pkgutil
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import msgspec
import pytest
import typer

import cbtfs
from cbtfs.cli.app import application

ROOT = Path(__file__).parent.parent
MODULES = sorted(module.name for module in pkgutil.walk_packages(cbtfs.__path__, "cbtfs."))
SCRIPTS = ("contrib/setup", "contrib/test", "contrib/demo", "contrib/pin", ".ci/run")
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "contrib" / "docs").glob("*.md")])
REGISTRIES = re.compile(
    r"pypi\.org|pythonhosted|--(?:extra-)?index-url|--trusted-host|--find-links"
)


class Layers(msgspec.Struct):
    layers: list[str]


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_every_module_imports_and_says_what_it_is(name: str) -> None:
    documentation = importlib.import_module(name).__doc__

    assert documentation
    assert documentation.strip().splitlines()[0].endswith((".", ":", "?", ">``"))


def test_everything_has_a_layer() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    layers = text[text.index("layers = [") : text.index("]", text.index("layers = ["))]
    known = set(re.findall(r"\w+", re.sub(r"#.*", "", layers))) - {"layers"}

    assert {name.split(".")[1] for name in MODULES} == known


def test_version_is_in_the_changelog() -> None:
    assert f"## {cbtfs.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_license_is_mit() -> None:
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n")


# ── Setting up ──


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_executable_and_valid_shell(name: str) -> None:
    assert (ROOT / name).stat().st_mode & 0o111 == 0o111
    assert subprocess.run(["sh", "-n", ROOT / name], check=False).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "contrib").glob("requirements*.txt")), ids=str)
def test_pins_have_hashes_and_name_no_registry(path: Path) -> None:
    text = path.read_text()
    pins = re.findall(r"^[\w.-]+==\S+", text, re.MULTILINE)

    assert pins
    assert len(re.findall(r"^[\w.-]+==\S+ \\\n    --hash=sha256:", text, re.MULTILINE)) == len(pins)
    assert not REGISTRIES.search(text)


def test_every_dependency_is_pinned() -> None:
    table = project()["project"]
    assert isinstance(table, dict)
    wanted = [*table["dependencies"], *table["optional-dependencies"]["test"]]
    pinned = (ROOT / "contrib" / "requirements-test.txt").read_text().lower().replace("_", "-")

    for requirement in wanted:
        name = re.split(r"[\[<>=]", requirement)[0].lower().replace("_", "-")
        assert f"\n{name}==" in pinned, name


# ── Documents ──


def commands_in(path: Path) -> list[str]:
    """Return the cbtfs commands in the indented blocks of a document."""
    lines = path.read_text().splitlines()
    found = [line.strip() for line in lines if line.startswith("    ")]
    return [line.split("  #")[0] for line in found if line.startswith("cbtfs ")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_command_in_a_document_exists_with_its_options(path: Path) -> None:
    for line in commands_in(path):
        words = [word for word in shlex.split(line) if word not in ("&&", "&")]
        assert parses(words[1:]), line


def parses(words: list[str]) -> bool:
    """Tell whether the options and verbs of a command line are known."""
    command: object = typer.main.get_command(application())
    for word in words:
        assert isinstance(command, typer.core.TyperCommand | typer.core.TyperGroup)
        options = {
            name for param in command.params for name in (*param.opts, *param.secondary_opts)
        }
        if word.startswith("-") and word not in options | {"--help", "-h"}:
            return False
        if isinstance(command, typer.core.TyperGroup) and word in command.commands:
            command = command.commands[word]
    return isinstance(command, typer.core.TyperCommand)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


# ── Doors ──


def imports_of(path: Path) -> set[str]:
    """Return the top-level names of the modules that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize(
    ("library", "doors"),
    [
        ("nbd", {"export.py", "doctor.py"}),
        ("XenAPI", {"wire.py", "xapi.py"}),
        ("pyfuse3", {"fuse.py", "mount.py", "joined.py"}),
        ("fcntl", {"lock.py", "sparse.py", "simulator"}),
        ("typer", {"cli"}),
    ],
)
def test_outside_world_has_one_door(library: str, doors: set[str]) -> None:
    package = ROOT / "cbtfs"
    users = {
        path.relative_to(package).parts[0]
        for path in package.rglob("*.py")
        if library in imports_of(path)
    }

    assert users <= doors


def test_trio_is_run_in_one_place_only() -> None:
    package = ROOT / "cbtfs"
    users = [path.name for path in package.rglob("*.py") if "trio.run(" in path.read_text()]

    # joined.py is a program of its own
    assert set(users) <= {"running.py", "__init__.py", "joined.py"}
