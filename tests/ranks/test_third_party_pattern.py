"""The example of CONTRIBUTING.md, as it stands there: copied out, installed, run on real ranks, and validated."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ncclbench.errors import Exit
from tests.helpers.paths import ROOT

if TYPE_CHECKING:
    from tests.ranks.conftest import Starter

pytestmark = pytest.mark.ranks

CONTRIBUTING = ROOT / "CONTRIBUTING.md"
_BLOCK = re.compile(r"^( *)```(toml|python)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
PROJECT, PATTERN = "pyproject.toml", "my_patterns/shuffle.py"


def documented() -> dict[str, str]:
    """The fenced blocks whose first line names the file that they are."""
    found = {}
    for indent, _language, body in _BLOCK.findall(CONTRIBUTING.read_text()):
        lines = [line.removeprefix(indent) for line in body.splitlines()]
        if lines and lines[0].startswith("# ") and lines[0][2:].strip() in (PROJECT, PATTERN):
            found[lines[0][2:].strip()] = "\n".join(lines) + "\n"
    return found


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documented files, where they say that they belong."""
    files = documented()
    assert set(files) == {PROJECT, PATTERN}, "CONTRIBUTING.md no longer shows both files of its example"
    root = tmp_path_factory.mktemp("package")
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def build_backend(package: Path) -> str:
    """The module that builds it."""
    project = tomllib.loads((package / PROJECT).read_text())
    return str(project["build-system"]["build-backend"]).partition(".")[0].partition(":")[0]


@pytest.fixture(scope="module")
def site(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed; without its build backend, by hand from the same documented files."""
    target = tmp_path_factory.mktemp("site")
    if importlib.util.find_spec(build_backend(package)) is not None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
        done = subprocess.run(
            [*pip, "--no-build-isolation", "--no-deps", "--target", str(target), str(package)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, "PIP_ROOT_USER_ACTION": "ignore"},
        )
        assert done.returncode == 0, done.stderr
        return target
    return _unpack(package, target)


def _unpack(package: Path, target: Path) -> Path:
    project = tomllib.loads((package / PROJECT).read_text())["project"]
    module = target / PATTERN
    module.parent.mkdir()
    module.write_text((package / PATTERN).read_text())
    info = target / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"[{group}]\n{name} = {value}\n" for group, name, value in _points(project)]
    (info / "entry_points.txt").write_text("".join(lines))
    return target


def _points(project: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(group, name, value) for group, points in project["entry-points"].items() for name, value in points.items()]


def environ(site: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))}


def test_the_example_registers_itself_under_its_name(package: Path) -> None:
    project = tomllib.loads((package / PROJECT).read_text())["project"]
    assert ("ncclbench.patterns", "shuffle", "my_patterns.shuffle") in _points(project)


def test_the_installed_example_is_listed_with_its_first_line(site: Path, jobs: Starter) -> None:
    finished = jobs.ncclbench("list patterns", environ(site)).wait(30)
    assert finished.code == Exit.GOOD
    (line,) = [line for line in finished.out.splitlines() if line.startswith("shuffle ")]
    assert len(line.split()) > 3
    without = jobs.ncclbench("list patterns").wait(30)
    assert "shuffle " not in without.out


@pytest.mark.parametrize("transport", ["gloo", "threads"])
def test_the_installed_example_is_run_and_validated(transport: str, site: Path, jobs: Starter) -> None:
    line = f"run shuffle --transport {transport} --nproc 2 -b 4K -e 16K -f 4 -n 6 -w 1 --json -o run"
    finished = jobs.ncclbench(line, environ(site)).wait()
    assert finished.code == Exit.GOOD, finished.err
    assert [record["bytes"] for record in finished.records] == [4096, 16384]
    for record in finished.records:
        assert (record["pattern"], record["status"], record["wrong"]) == ("shuffle", "ok", 0)
        assert record["time_us"]["n"] == 6
        assert record["world_size"] == 2


def test_without_the_package_the_pattern_is_unknown(jobs: Starter) -> None:
    finished = jobs.ncclbench("run shuffle -e 8 --nproc 2").wait(30)
    assert finished.code == Exit.USAGE
    assert "no pattern 'shuffle'" in finished.err
