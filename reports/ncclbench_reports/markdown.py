"""Markdown: for an issue or a wiki page. The verdict first, then a table a run; text from outside is escaped."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ncclbench.store.run_directory import Run
from ncclbench.units import counted, format_size
from ncclbench_reports.common.across_starts import across_starts
from ncclbench_reports.common.record_frame import flat_frame, plain_rows
from ncclbench_reports.common.wording import (
    AS_DEEPEP,
    AS_OTHERS_COUNT,
    judgements,
    stamps,
    times_are,
    verdict_line,
    visible,
    warnings_of,
)
from ncclbench_reports.table import figure, rate, there, whole

SUFFIX = ".md"

_HEADER = (
    "case", "status", "size (B)", "time (us)", "p50 95% (us)", "p99 (us)", "skew (us)", "n",
    "algbw (GB/s)", "busbw (GB/s)", "#wrong",
)  # fmt: skip
_ACROSS = ("case", "ranks", "starts", "median (us)", "95% (us)", "least (us)", "most (us)", "busbw (GB/s)")
# Everything that CommonMark or GitHub's tables give a meaning to.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~$&]|^[#+-])")


def render(runs: Sequence[Run]) -> str:
    """The runs one after the other, then the medians over process starts."""
    flat = flat_frame(runs)
    rows = plain_rows(flat)
    parts = [_render_run(run, [row for row in rows if row["run"] == str(run.path)]) for run in runs]
    across = plain_rows(across_starts(flat))
    if across:
        parts.append(
            "## The same case over process starts\n\n" + grid(_ACROSS, (_across_cells(row) for row in across), 1)
        )
    return "\n\n".join(parts)


def escaped(text: object) -> str:
    """`text` as Markdown that shows it, letter by letter."""
    return _SPECIAL.sub(r"\\\1", visible(text))


def grid(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A table; its first `left` columns are text, the others are aligned to the right."""
    lines = [header, [":--" if k < left else "--:" for k in range(len(header))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _render_run(run: Run, rows: list[dict[str, Any]]) -> str:
    (judgement,) = judgements([run])
    manifest = run.manifest
    parts = [
        f"## {escaped(run.path)}",
        f"**{escaped(verdict_line(judgement))}**",
        f"{counted(manifest.world_size, 'rank')} over "
        f"{escaped(manifest.transport or 'several transports')}; {times_are(run)}; GB is 1e9 bytes",
    ]
    parts += [f"> {escaped(stamp)}" for stamp in stamps(run, judgement)]
    others = [(name, head) for name, head in AS_OTHERS_COUNT if any(there(row[name]) for row in rows)]
    header = (*_HEADER, *(f"{head} (GB/s)" for _, head in others))
    cells = ([*_cells(row), *(rate(row[name]) for name, _ in others)] for row in rows)
    parts.append(grid(header, cells, 2) if rows else "no case has finished")
    parts += [AS_DEEPEP] if others else []
    if judgement and judgement.checks:
        checks = ([c.check, c.subject, c.verdict, c.reason or "", c.action or ""] for c in judgement.checks)
        cells = ([escaped(cell) for cell in row] for row in checks)
        parts.append(grid(("check", "subject", "verdict", "reason", "action"), cells, 5))
    warnings = warnings_of(run)
    if warnings:
        parts.append("\n".join(f"- {escaped(warning)}" for warning in warnings))
    return "\n\n".join(parts)


def _cells(row: dict[str, Any]) -> list[str]:
    interval = f"{figure(row['p50_lo_us'])}..{figure(row['p50_hi_us'])}" if there(row["p50_lo_us"]) else "-"
    return [
        escaped(row["case"]),
        escaped(row["status"]),
        format_size(row["bytes"] if row["size_bytes"] is None else row["size_bytes"]),
        figure(row["p50_us"]),
        interval,
        figure(row["p99_us"]),
        figure(row["skew_p50_us"]),
        whole(row["n"]),
        rate(row["alg_gb_per_s"]),
        rate(row["bus_gb_per_s"]),
        whole(row["wrong"]) if there(row["wrong"]) else "N/A",
    ]


def _across_cells(row: dict[str, Any]) -> list[str]:
    interval = f"{figure(row['p50_lo_us'])}..{figure(row['p50_hi_us'])}" if there(row["p50_lo_us"]) else "-"
    return [
        escaped(row["case"]),
        whole(row["world_size"]),
        whole(row["starts"]),
        figure(row["p50_us"]),
        interval,
        figure(row["p50_min_us"]),
        figure(row["p50_max_us"]),
        rate(row["bus_gb_per_s"]),
    ]
