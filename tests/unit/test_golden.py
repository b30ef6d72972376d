"""Stored runs of an earlier version read, report, verify and compare as they did when they were made.

`scripts/make_golden.py` says how the runs were made. The expected texts are what the same version printed of them;
``NCCLBENCH_UPDATE_GOLDEN=1 pytest tests/unit/test_golden.py`` writes them again, for a change of wording that is meant:
look at the difference before it is committed. Only the command line is used here, so that this file survives a change
of everything behind it.
"""

import difflib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ncclbench.cli import main
from tests.helpers.paths import FIXTURES, GOLDEN

RUNS, PLANS, EXPECTED = GOLDEN / "runs", GOLDEN / "plans", GOLDEN / "expected"
UPDATING = bool(os.environ.get("NCCLBENCH_UPDATE_GOLDEN"))

LAUNCHER_PREFIXES = ("OMPI_", "PMI", "MPI_LOCAL", "SLURM_", "FLUX_", "NCCL", "GROUP_", "TORCHELASTIC_", "GLOO_", "UCX_")
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

TEXT_FORMATS = ("csv", "json", "junit", "markdown", "nccl-tests", "prometheus")
# What every format shows: each kind of record is in at least one of these.
IN_EVERY_FORMAT = ("rich", "gloo", "mpi", "modes", "accepted-gpus-faults", "imported-osu")
IN_HTML = ("rich", "gloo", "rails", "starts", "mpi", "accepted-gpus-sick", "accepted-gpus-faults", "imported-json")


@dataclass(frozen=True)
class Replay:
    """A command.

    Attributes:
        name: of the file with what is expected.
        line: the command line, in a folder with copies of all that it names.
        files: what it makes or changes there, and what is compared of it as well.
    """

    name: str
    line: str
    files: tuple[str, ...] = ()


def runs() -> list[str]:
    """All stored runs; ``before`` and ``after`` are folders of runs."""
    return sorted(path.name for path in RUNS.iterdir() if (path / "manifest.json").exists())


def reports() -> Iterator[Replay]:
    for run in runs():
        yield Replay(f"{run}.report", f"report {run}")
    for run in IN_EVERY_FORMAT:
        for fmt in TEXT_FORMATS:
            yield Replay(f"{run}.report-{fmt}", f"report {run} --format {fmt}")
        yield Replay(f"{run}.report-parquet", f"report {run} -o out.parquet", ("out.parquet",))
    for run in IN_HTML:
        yield Replay(f"{run}.report-html", f"report {run} -o out.html", ("out.html",))
    for one, other in (("small", "small-slower"), ("starts", "accepted-starts"), ("gloo", "rich")):
        for fmt in ("table", "csv"):
            yield Replay(f"{one}+{other}.report-{fmt}", f"report {one} {other} --format {fmt}")
    yield Replay("before.report-html", "report before/1 before/2 before/3 -o out.html", ("out.html",))
    yield Replay("unknown-fields.report-json", "report unknown-fields --format json")
    yield Replay("cut-off.report-csv", "report cut-off --format csv")


def comparisons() -> Iterator[Replay]:
    pairs = {
        "folders": "before after",
        "slower": "small small-slower",
        "faster": "small-slower small",
        "sick": "gpus accepted-gpus-sick",
        "cut-off": "starts cut-off",
        "imported": "imported-nccl-tests imported-json",
        "unlike": "threads gloo",
        "forced": "threads gloo --force",
        "nothing-in-common": "imported-osu imported-imb --force",
    }
    for name, pair in pairs.items():
        for fmt in ("table", "json", "markdown"):
            yield Replay(f"{name}.compare-{fmt}", f"compare {pair} --format {fmt}")
    yield Replay("slower.compare-html", "compare small small-slower -o out.html", ("out.html",))


def verdicts() -> Iterator[Replay]:
    for run in runs():
        if (RUNS / run / "accept").exists():
            yield Replay(f"{run}.verify", f"verify {run}")
    yield Replay("small.verify", "verify small")
    small, h100 = "--profile plans/small.toml", "--profile h100-hgx-ib"
    lines = {
        "accepted-small": f"{small} --baseline small-slower",
        "accepted-starts": f"{small} --json",
        "accepted-gpus": h100,
        "accepted-gpus-later": f"{h100} --baseline gpus",
        "accepted-gpus-sick": f"{h100} --baseline gpus",
        "accepted-gpus-short": h100,
        "accepted-gpus-faults": f"{h100} --baseline gpus --force --json",
        "cut-off": small,
        "rich": small,
        "imported-osu": small,
    }
    files = ("verdict.json", "accept/checks.csv", "accept/junit.xml", "accept/metrics.prom")
    for run, options in lines.items():
        yield Replay(f"{run}.accept", f"accept {run} {options}", tuple(f"{run}/{file}" for file in files))
    yield Replay("gpus.make-profile", "accept --make-profile gpus")


def others() -> Iterator[Replay]:
    threads = (
        "all_reduce all_to_all cross_rail --dtype float32 --dtype bfloat16 --timing all -b 1K -e 4K -f 4 -n 12 -w 1"
    )
    results = "threads/results.jsonl"
    yield Replay("threads.resume", f"run {threads} --transport threads --nproc 2 -o threads --resume", (results,))
    rails = "--plan plans/rails.toml --topology plans/cluster.toml --transport threads --nproc 8"
    yield Replay("rails.resume", f"run {rails} -o rails --resume", ("rails/results.jsonl",))
    yield Replay("rails.resume-of-another", f"run {rails} -o threads --resume")
    lab = "--topology plans/pair.toml"
    yield Replay("quick.dry-run", "run --plan quick --transport gloo --nproc 4 --dry-run")
    yield Replay("rails-quick.dry-run", f"run --plan rails-quick {lab} --transport gloo --nproc 4 --dry-run")
    yield Replay("cross-rail.dry-run", f"run --plan cross-rail {lab} --transport nccl --nproc 4 --dry-run --json")
    yield Replay("moe-quick.dry-run", "run --plan moe-quick --transport gloo --nproc 4 --dry-run --json")
    yield Replay("accept.dry-run", "accept --profile cpu-gloo --transport gloo --nproc 4 --dry-run")
    yield Replay("cluster.topo", "topo --topology plans/cluster.toml --ep 4")
    yield Replay("cluster.topo-json", "topo --topology plans/cluster.toml --json")
    logs = {
        "nccl-tests": "logs/nccl-tests/all_reduce.txt logs/nccl-tests/alltoall.txt",
        "nccl-tests-json": "logs/nccl-tests/all_reduce_per_iteration.json",
        "osu": "logs/osu/osu_allreduce_full.txt logs/osu/osu_iallreduce_full.txt --world-size 4",
        "imb": "logs/imb/imb_2018.txt logs/imb/imb_multi.txt --json",
    }
    for name, line in logs.items():
        yield Replay(f"{name}.import", f"import {line} -o new", ("new/manifest.json", "new/results.jsonl"))


REPLAYS = [*reports(), *comparisons(), *verdicts(), *others()]


@pytest.fixture
def replay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[[Replay], str]:
    """Runs a command in this process, in a folder of its own; returns all that there is to compare."""
    for name in list(os.environ):
        if name.startswith(LAUNCHER_PREFIXES) or name in LAUNCHER_NAMES:
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)  # paths are then the same wherever the test runs
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(os, "fsync", lambda _file: None)  # these copies need not survive a power cut

    def call(one: Replay) -> str:
        words = shlex.split(one.line)
        for top in {word.split("/")[0] for word in words}:
            source = {"plans": PLANS, "logs": FIXTURES}.get(top, RUNS / top)
            if source.is_dir():
                shutil.copytree(source, tmp_path / top)
        monkeypatch.setattr(sys, "argv", ["ncclbench", *words])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        parts = [f"$ ncclbench {one.line}\nexit code {left.value.code}\n", f"---- stdout\n{out}", f"---- stderr\n{err}"]
        parts += [f"---- {name}\n{as_text(tmp_path / name)}" for name in one.files]
        return normalised("".join(part if part.endswith("\n") else part + "\n" for part in parts))

    return call


@pytest.mark.parametrize("one", REPLAYS, ids=lambda one: one.name)
def test_an_earlier_run_reads_as_it_did(one: Replay, replay: Callable[[Replay], str]) -> None:
    found = replay(one)
    file = EXPECTED / f"{one.name}.txt"
    if UPDATING:
        EXPECTED.mkdir(exist_ok=True)
        if not file.exists() or differences(normalised(file.read_text(encoding="utf-8")), found):
            file.write_text(found, encoding="utf-8")
        return
    assert differences(normalised(file.read_text(encoding="utf-8")), found) == ""


def test_no_expected_text_is_left_over() -> None:
    assert {file.name for file in EXPECTED.iterdir()} == {f"{one.name}.txt" for one in REPLAYS}


# A fraction, but not a part of a version, an address or a hash.
_FRACTION = re.compile(r"(?<![\w.])-?\d+\.\d+(?:e[-+]?\d+)?(?![\w.])")


def differences(expected: str, found: str) -> str:
    """The first lines that differ; pytest's own comparison takes minutes for a long page."""
    lines = difflib.unified_diff(expected.splitlines(), alike(expected, found).splitlines(), "expected", "found", n=0)
    return "\n".join(line[:400] for line in islice(lines, 40))


def alike(expected: str, found: str) -> str:
    """`found`, with the expected fraction wherever the two differ by rounding only.

    Statistics are computed anew from samples, and other versions of NumPy and SciPy may add in another order.
    """
    wanted, had = _FRACTION.findall(expected), _FRACTION.findall(found)
    if len(wanted) != len(had):
        return found
    chosen = (
        one if abs(float(one) - float(other)) <= 1e-9 * abs(float(one)) else other
        for one, other in zip(wanted, had, strict=True)
    )
    return _FRACTION.sub(lambda _match: next(chosen), found)


def normalised(text: str) -> str:
    """Without what must differ from then: the version that makes a document; what a run has recorded stays."""
    makers = r'Made by ncclbench |written by ncclbench |judged_by": ?"ncclbench |^  "ncclbench": "'
    return re.sub(rf"({makers})\d[\w+-]*(?:\.[\w+-]+)*", r"\1VERSION", text, flags=re.MULTILINE)


def as_text(path: Path) -> str:
    """A file that a command has made, line by line; "(missing)" if it has not."""
    if not path.exists():
        return "(missing)"
    match path.suffix:
        case ".html":
            return html_text(path.read_text(encoding="utf-8"))
        case ".parquet":
            return parquet_text(path)
        case ".json" if path.name == "manifest.json":
            manifest = json.loads(path.read_text(encoding="utf-8"))
            # The machine that imports, and when it did, are no part of what was read.
            kept = {name: value for name, value in manifest.items() if name not in ("provenance", "started")}
            return json.dumps(kept, indent=1)
        case _:
            return path.read_text(encoding="utf-8")


def parquet_text(path: Path) -> str:
    """Columns with their types, then a line for each row."""
    table = pq.read_table(path)
    columns = [f"{column.name}: {column.type}" for column in table.schema]
    names = sorted(name.decode() for name in table.schema.metadata or {})
    rows = [json.dumps(list(row.values()), default=str) for row in table.to_pylist()]
    return "\n".join([*columns, f"metadata: {names}", *rows])


def html_text(page: str) -> str:
    """What a page says and draws: its texts and the data of its figures and tables, without styles and programs."""
    reader = _Page()
    reader.feed(page)
    reader.close()
    return "\n".join(reader.lines)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self._inside = "data" if named.get("type") == "application/json" else tag
        if tag == "div" and "data-figure" in named:
            self.lines.append(f"[figure {named['data-figure']}: {named.get('aria-label')}]")

    def handle_endtag(self, _tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            parsed = json.loads(data)
            items = parsed.items() if isinstance(parsed, dict) else enumerate(parsed)
            self.lines += [f"{name}: {json.dumps(value, sort_keys=True)}" for name, value in items]
        elif self._inside not in ("style", "script") and data.strip():
            self.lines.append(" ".join(data.split()))
