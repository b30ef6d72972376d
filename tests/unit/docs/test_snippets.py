"""Commands, Python snippets and links of README, docs and ``--help``, parsed and run as far as one machine allows.

Every ``ncclbench`` command line is parsed against the real commands. ``run`` and ``accept`` are executed with
``--dry-run``, which also checks patterns, parameters, plans and profiles. Lines that need a cluster (torchrun on two
nodes, srun) run their ``ncclbench`` part the same way.
"""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from ncclbench.cli import cli
from tests.helpers.paths import DOCS, ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(ncclbench [^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:docs|scripts|tests|ncclbench|patterns|reports)/[\w./-]+)`")
_ENDS = {"|", ";", "&&", "||", ">", "2>", "...", "done"}
_LAUNCHER = ("OMPI_", "PMI_", "MPI_LOCAL", "SLURM_", "FLUX_", "NCCLBENCH_", "GROUP_", "TORCHELASTIC_")
_LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Two nodes of four rails, for examples that name a topology file.
_CLUSTER = "schema = 1\n" + "".join(
    f'[[node]]\nname = "n{node}"\n' + "".join(f"[[node.nic]]\nrail = {rail}\n" for rail in range(4))
    for node in range(2)
)
_RANKS = "".join(f'[[rank]]\nrank = {k}\nnode = "n{k // 4}"\nrail = {k % 4}\n' for k in range(8))
# moe-full: its dry run draws the routings of 65 cases, which takes longer than all other snippets together.
# shuffle: the pattern of CONTRIBUTING.md, which tests/ranks/test_third_party_pattern.py installs and runs.
_ONLY_PARSED = {"moe-full", "shuffle"}


@dataclass(frozen=True)
class Snippet:
    """One piece of a page."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def code_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines of code blocks, fenced and indented, with a continued line joined to its first."""
    fenced = False
    joined, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        if not (fenced or line.startswith("    ")):
            joined = ""
            continue
        first = first if joined else number
        joined += line.strip()
        if joined.endswith("\\"):
            joined = joined[:-1] + " "
            continue
        yield first, joined
        joined = ""


def arguments_of(line: str) -> list[str] | None:
    """What stands behind ``ncclbench`` in a shell line, without the brackets of a synopsis; None without one."""
    if not re.search(r"\bncclbench\b", line):
        return None
    try:
        tokens = shlex.split(line, comments=True)
    except ValueError:  # prose or a program's output
        return None
    if "ncclbench" not in tokens:
        return None
    found = []
    for token in tokens[tokens.index("ncclbench") + 1 :]:
        if token in _ENDS:
            break
        ends = token.endswith(";")
        found.append(token.removeprefix("[").removesuffix(";").removesuffix("]"))
        if ends:
            break
    return found


def commands() -> list[Snippet]:
    """Every different ``ncclbench`` line of the pages, from code blocks and from code inside a sentence."""
    found: dict[str, Snippet] = {}
    for page in PAGES:
        text, name = page.read_text(), page.relative_to(ROOT).as_posix()
        for number, line in code_lines(text):
            if arguments_of(line):
                found.setdefault(line, Snippet(name, number, line))
        for match in _INLINE.finditer(text):
            line = " ".join(match[1].split())
            found.setdefault(line, Snippet(name, text.count("\n", 0, match.start()) + 1, line))
    for name in cli.list_commands(click.Context(cli)):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        text = command.get_help(click.Context(command, info_name=f"ncclbench {name}", **command.context_settings))
        examples = [line.strip() for line in text.splitlines() if "ncclbench" in line and "Usage:" not in line]
        for number, line in enumerate(examples, 1):
            found.setdefault(line, Snippet(f"ncclbench {name} --help", number, line))
    return [snippet for snippet in found.values() if arguments_of(snippet.text)]


def fenced(language: str) -> list[Snippet]:
    """The fenced blocks of one language."""
    return [
        Snippet(page.relative_to(ROOT).as_posix(), text.count("\n", 0, match.start()) + 1, _unindented(match))
        for page in PAGES
        for text in [page.read_text()]
        for match in _FENCE.finditer(text)
        if match[2] == language
    ]


def _unindented(match: re.Match[str]) -> str:
    return "".join(line.removeprefix(match[1]) for line in match[3].splitlines(keepends=True))


def parse(arguments: list[str]) -> None:
    """Refuse a command, an option or a choice that does not exist; placeholders such as RUN pass.

    Raises:
        click.UsageError: with the name that is unknown.
    """
    command: click.Command | None = cli
    if arguments and not arguments[0].startswith("-"):
        command = cli.get_command(click.Context(cli), arguments[0])
        if command is None:
            raise click.UsageError(f"no command {arguments[0]!r}")
        arguments = arguments[1:]
    assert command is not None
    context = click.Context(command)
    values, _, _ = command.make_parser(context).parse_args(list(arguments))
    for parameter in command.params:
        value = values.get(parameter.name or "")
        if isinstance(parameter.type, click.Choice) and isinstance(value, str) and not value.isupper():
            parameter.type.convert(value, parameter, context)


def can_run_dry(arguments: list[str]) -> bool:
    """Whether the line names what to measure: a pattern, a plan, or a profile without a finished run."""
    if "..." in " ".join(arguments) or any(re.fullmatch(r"[A-Z]+(\|[A-Z]+)*", argument) for argument in arguments):
        return False  # a synopsis
    if not arguments or _ONLY_PARSED & set(arguments):
        return False
    if arguments[0] == "run":
        return len(arguments) > 1 and (not arguments[1].startswith("-") or "--plan" in arguments)
    return arguments[0] == "accept" and arguments[1:2] == ["--profile"]


def run_dry(arguments: list[str]) -> Result:
    """Execute a line with ``--dry-run``, over threads and on 8 ranks where it names neither."""
    line = [re.sub(r"^tokens=\d+$", "tokens=16", argument) for argument in arguments]
    added = ["--dry-run"]
    if line[0] == "run" and "--transport" not in line:
        added += ["--transport", "threads"]
    if "--nproc" not in line:
        group = re.search(r"\bep=(\d+)", " ".join(line))
        added += ["--nproc", group[1] if group else "8"]
    return CliRunner().invoke(cli, [*line, *added])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory as the pages assume it: the checkout's files, a topology file, and no launcher."""
    for name in list(os.environ):
        if name.startswith(_LAUNCHER) or name in _LAUNCHER_NAMES:
            monkeypatch.delenv(name)
    for name in ("docs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("cluster.toml", "lab.toml"):
        (tmp_path / name).write_text(_CLUSTER + _RANKS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("snippet", commands(), ids=str)
def test_command_exists_with_its_options(snippet: Snippet) -> None:
    arguments = arguments_of(snippet.text)
    assert arguments is not None
    parse(arguments)


@pytest.mark.parametrize("snippet", [one for one in commands() if can_run_dry(arguments_of(one.text) or [])], ids=str)
def test_run_and_accept_lines_run_dry(snippet: Snippet, folder: Path) -> None:
    result = run_dry(arguments_of(snippet.text) or [])
    assert result.exit_code == 0, f"{snippet.text}: {result.output} {result.exception}"
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    "line",
    [
        "ncclbench mesure all_reduce",
        "ncclbench run all_reduce --nprocs 4 --frobnicate 1",
        "ncclbench list patern",
        "torchrun --nproc-per-node 8 -m ncclbench run all_reduce --no-such-option",
    ],
)
def test_parser_refuses_a_broken_line(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(arguments_of(line) or [])


@pytest.mark.parametrize(
    "line",
    [
        "ncclbench run all_reduc",
        "ncclbench run all_reduce --param redop=maximum",
        "ncclbench run --plan quik",
        "ncclbench accept --profile h100-hgx-ob",
    ],
)
def test_dry_run_refuses_a_broken_line(line: str, folder: Path) -> None:
    assert folder.is_dir()
    assert run_dry(arguments_of(line) or []).exit_code != 0


def test_lines_are_found() -> None:
    """Guards the extraction: a page without examples, or a regular expression that finds none, is a mistake."""
    texts = [snippet.text for snippet in commands()]
    assert len(texts) > 40
    assert any("torchrun" in text for text in texts)
    assert sum(can_run_dry(arguments_of(text) or []) for text in texts) > 20
    assert list(code_lines("    ncclbench run a \\\n        -b 8\n")) == [(1, "ncclbench run a  -b 8")]
    assert arguments_of("for k in 1 2; do ncclbench run --plan quick -o runs/$k; done") == [
        *("run", "--plan", "quick", "-o", "runs/$k")
    ]


@pytest.mark.parametrize("snippet", fenced("python"), ids=str)
def test_python_snippet_runs(snippet: Snippet, folder: Path) -> None:
    for name in ("first", "second"):
        line = ["run", "all_reduce", "--transport", "threads", "--nproc", "2", "-b", "1K", "-e", "4K", "-f", "4"]
        made = CliRunner().invoke(cli, [*line, "-n", "6", "-w", "1", "-o", str(folder / "runs" / name)])
        assert made.exit_code == 0, made.output
    exec(compile(snippet.text, str(snippet), "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("snippet", fenced("toml"), ids=str)
def test_toml_snippet_parses(snippet: Snippet) -> None:
    assert tomllib.loads(snippet.text)


def test_readme_shows_a_pattern_as_it_is() -> None:
    shown = [snippet.text for snippet in fenced("python") if snippet.page == "README.md"]
    real = (ROOT / "patterns/ncclbench_patterns/all_to_all.py").read_text()
    assert real in shown, "copy all_to_all.py into the README, section 'Add a pattern in one file'"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in _LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_files_exist(page: Path) -> None:
    # A file to be written is called NAME.py; its folder must be there.
    named = [name.removesuffix("NAME.py") for name in _PATH.findall(page.read_text())]
    assert [name for name in named if not (ROOT / name).exists()] == []
