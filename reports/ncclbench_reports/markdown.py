"""Markdown, for an issue or a wiki page: per run the verdict first, then a table; text from outside is escaped."""

import re
from collections.abc import Iterable, Sequence

from ncclbench.store.run_directory import Run
from ncclbench.units import counted, format_size
from ncclbench_reports.common.process_starts import AcrossStarts, across_starts
from ncclbench_reports.common.record_rows import RecordRow, record_rows
from ncclbench_reports.common.run_summary import (
    DEEPEP_NOTE,
    deepep_rates,
    stamps,
    times_are,
    verdict_line,
    verdicts_of,
    warnings_of,
)
from ncclbench_reports.common.text_format import interval, microseconds, rate, visible, whole, wrong_elements

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
    parts = [_render_run(run) for run in runs]
    across = across_starts(record_rows(runs))
    if across:
        parts.append(
            "## The same case over process starts\n\n" + grid(_ACROSS, (_across_cells(row) for row in across), 1)
        )
    return "\n\n".join(parts)


def escaped(text: object) -> str:
    """`text` as Markdown that shows it, character by character."""
    return _SPECIAL.sub(r"\\\1", visible(text))


def grid(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A table; its first `left` columns are text, the others are aligned to the right."""
    lines = [header, [":--" if k < left else "--:" for k in range(len(header))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _render_run(run: Run) -> str:
    (verdict,) = verdicts_of([run])
    rows = record_rows([run])
    manifest = run.manifest
    parts = [
        f"## {escaped(run.path)}",
        f"**{escaped(verdict_line(verdict))}**",
        f"{counted(manifest.world_size, 'rank')} over "
        f"{escaped(manifest.transport or 'several transports')}; {times_are(run)}; GB is 1e9 bytes",
    ]
    parts += [f"> {escaped(stamp)}" for stamp in stamps(run, verdict)]
    others = deepep_rates(rows)
    header = (*_HEADER, *(f"{head} (GB/s)" for _, head in others))
    cells = ([*_cells(row), *(rate(row.figure(name)) for name, _ in others)] for row in rows)
    parts.append(grid(header, cells, 2) if rows else "no case has finished")
    parts += [DEEPEP_NOTE] if others else []
    if verdict and verdict.checks:
        checks = ([c.check, c.subject, c.verdict, c.reason or "", c.action or ""] for c in verdict.checks)
        cells = ([escaped(cell) for cell in row] for row in checks)
        parts.append(grid(("check", "subject", "verdict", "reason", "action"), cells, 5))
    warnings = warnings_of(run)
    if warnings:
        parts.append("\n".join(f"- {escaped(warning)}" for warning in warnings))
    return "\n\n".join(parts)


def _cells(row: RecordRow) -> list[str]:
    return [
        escaped(row.case),
        escaped(row.status),
        format_size(row.moved_bytes),
        microseconds(row.p50_us),
        interval(row.p50_lo_us, row.p50_hi_us),
        microseconds(row.p99_us),
        microseconds(row.skew_p50_us),
        whole(row.n),
        rate(row.alg_gb_per_s),
        rate(row.bus_gb_per_s),
        wrong_elements(row.wrong),
    ]


def _across_cells(row: AcrossStarts) -> list[str]:
    return [
        escaped(row.case),
        whole(row.world_size),
        whole(row.starts),
        microseconds(row.p50_us),
        interval(row.p50_lo_us, row.p50_hi_us),
        microseconds(row.p50_min_us),
        microseconds(row.p50_max_us),
        rate(row.bus_gb_per_s),
    ]
