"""Compare two sides, with a verdict on each case.

NEW is *worse* in a case if its starts are slower by more than the margin, and if its p-value is at most 4%. The p-value
is adjusted for all cases together (Holm). 4% and not 5% keeps the rate of false alarms below 5% also in a sample of a
thousand comparisons, and not only on average. With 5 starts per side and 2% variation between starts, a change of 5% is
still found in 95% of comparisons.

With one start per side, the variation between starts is unknown. Then the records' own intervals are used, the margin
is ten times as wide, and a remark says so.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ncclbench.analysis.comparability import differences, remarks
from ncclbench.analysis.run_sets import Side
from ncclbench.analysis.significance import Statistics, compute, holm, normal_p
from ncclbench.errors import UsageError
from ncclbench.store.records import Record

ALPHA = 0.04
MARGIN = 0.01
ONE_START_MARGIN = 0.10
# Half the width of a 95% interval, in standard errors.
_Z = 1.959964

Word = Literal["better", "same", "worse", "not comparable"]


@dataclass(frozen=True, kw_only=True)
class CaseComparison:
    """One case on both sides; times are in microseconds, and None where they are unknown.

    Attributes:
        case: name of the case.
        verdict: better, same, worse or not comparable.
        reason: reason of the verdict.
        base_starts: number of process starts of BASE that have the case.
        new_starts: number of process starts of NEW that have the case.
        base_us: median over the starts of BASE.
        new_us: median over the starts of NEW.
        ratio: `new_us` over `base_us`; above 1 is slower.
        ratio_lo: lower end of the 95% interval of `ratio`.
        ratio_hi: upper end of the 95% interval of `ratio`.
        p: Holm-adjusted one-sided p-value, in the direction of `ratio`.
        p_kruskal: unadjusted p-value of the Kruskal-Wallis test; None with one start per side.
        delta: Cliff's delta; None with one start per side.
    """

    case: str
    verdict: Word
    reason: str
    base_starts: int = 0
    new_starts: int = 0
    base_us: float | None = None
    new_us: float | None = None
    ratio: float | None = None
    ratio_lo: float | None = None
    ratio_hi: float | None = None
    p: float | None = None
    p_kruskal: float | None = None
    delta: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All cases of both sides.

    Attributes:
        base: name of BASE.
        new: name of NEW.
        cases: the cases in BASE's order, then those that only NEW has.
        remarks: allowed differences that a reader should know.
        forced: differences that forbid the comparison without `force`.
        margin: the smallest change that counts, as a share.
    """

    base: str
    new: str
    cases: Sequence[CaseComparison]
    remarks: Sequence[str]
    forced: Sequence[str]
    margin: float

    def count(self, word: Word) -> int:
        """The number of cases with this verdict."""
        return sum(case.verdict == word for case in self.cases)

    @property
    def verdict(self) -> Word:
        """The verdict on all cases: worse if any case is; not comparable if no case could be compared."""
        words = {case.verdict for case in self.cases}
        order: tuple[Word, ...] = ("worse", "better", "same")
        return next((word for word in order if word in words), "not comparable")


def compare(base: Side, new: Side, *, force: bool = False, margin: float = MARGIN) -> Comparison:
    """Compare all cases of two sides.

    Raises:
        UsageError: if fabric, record version or settings differ and `force` is not given.
    """
    unlike = differences(base, new)
    if unlike and not force:
        more = f" (and {len(unlike) - 1} more)" if len(unlike) > 1 else ""
        raise UsageError(f"not comparable: {unlike[0]}{more}; --force compares them nevertheless, and says so")
    sides = [_by_case(side) for side in (base, new)]
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    return Comparison(
        base=base.name,
        new=new.name,
        cases=_judge_all({name: (sides[0].get(name, []), sides[1].get(name, [])) for name in names}, margin),
        remarks=[*_few_starts(sides), *remarks(base, new)],
        forced=unlike,
        margin=margin,
    )


def _by_case(side: Side) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = defaultdict(list)
    for _, record in side.records():
        found[record.case].append(record)
    return found


def _few_starts(sides: Sequence[Mapping[str, Sequence[Record]]]) -> list[str]:
    """A remark if there are too few starts to estimate the variation between starts."""
    least = min((len(records) for side in sides for records in side.values()), default=0)
    if least > 2 or not all(sides):
        return []
    if max(len(records) for side in sides for records in side.values()) == 1:
        return [
            "one process start per side: what differs from start to start is not known, so that only changes of "
            f"{ONE_START_MARGIN:.0%} count; make at least three of each"
        ]
    return [f"a side has cases with {least} process start{'s' if least > 1 else ''}: make at least three of each"]


Pair = tuple[list[Record], list[Record]]


def _judge_all(pairs: Mapping[str, Pair], margin: float) -> list[CaseComparison]:
    """The verdicts in the order of `pairs`; cases with equal numbers of starts are computed together."""
    judged: dict[str, CaseComparison] = {}
    shapes: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, pair in pairs.items():
        early = _without_figures(name, pair)
        if early:
            judged[name] = early
        else:
            shapes[len(pair[0]), len(pair[1])].append(name)
    tested: dict[str, tuple[Statistics, int]] = {}
    for names in shapes.values():
        tests = _tests([pairs[name] for name in names])
        tested |= {name: (tests, index) for index, name in enumerate(names)}
    if tested:
        slower, faster = (
            holm(np.array([getattr(tests, side)[index] for tests, index in tested.values()]))
            for side in ("p_slower", "p_faster")
        )
        for k, (name, (tests, index)) in enumerate(tested.items()):
            judged[name] = _judge(name, pairs[name], tests, index, (float(slower[k]), float(faster[k])), margin)
    return [judged[name] for name in pairs]


def _without_figures(name: str, pair: Pair) -> CaseComparison | None:
    """The verdict on a case that a side lacks or did not measure; None if there are figures to compare."""
    base, new = pair
    starts = {"base_starts": len(base), "new_starts": len(new)}
    for records, side in ((base, "BASE"), (new, "NEW")):
        if not records:
            return CaseComparison(case=name, verdict="not comparable", reason=f"{side} has no such case", **starts)
    for records, side in ((base, "BASE"), (new, "NEW")):
        bad = next((record for record in records if record.status != "ok"), None)
        if bad is None:
            continue
        broken = side == "NEW" and bad.status != "skipped"
        reason = f"{side} is {bad.status}: {bad.reason}"
        return CaseComparison(case=name, verdict="worse" if broken else "not comparable", reason=reason, **starts)
    if any(record.time_us is None or record.time_us.p50 <= 0 for record in (*base, *new)):
        return CaseComparison(case=name, verdict="not comparable", reason="a start has no time", **starts)
    if len(base) == len(new) == 1 and any(_error(record) is None for record in (*base, *new)):
        reason = "one start per side, and fewer than 6 samples in it: there is no interval"
        return CaseComparison(case=name, verdict="not comparable", reason=reason, **starts)
    return None


def _error(record: Record) -> float | None:
    """Standard error of the logarithm of the record's median, from the median's interval."""
    time_us = record.time_us
    if time_us is None or not time_us.p50_lo or not time_us.p50_hi:
        return None
    return float(np.log(time_us.p50_hi / time_us.p50_lo) / 2 / _Z)


def _log_medians(records: Sequence[Record]) -> list[float]:
    return [float(np.log(record.time_us.p50)) for record in records if record.time_us]


def _tests(pairs: Sequence[Pair]) -> Statistics:
    """The statistics of cases with equal numbers of starts."""
    base_CM, new_CN = (np.array([_log_medians(pair[side]) for pair in pairs]) for side in (0, 1))
    if base_CM.shape[1] + new_CN.shape[1] > 2:
        return compute(base_CM, new_CN)
    shift_C = new_CN[:, 0] - base_CM[:, 0]
    errors = [[_error(record) or 0.0 for record in (*base, *new)] for base, new in pairs]
    error_C = np.sqrt((np.array(errors) ** 2).sum(axis=1))
    p_slower_C, p_faster_C = normal_p(shift_C, error_C)
    unknown_C = np.full(len(pairs), np.nan)
    low_C, high_C = np.exp(shift_C - _Z * error_C), np.exp(shift_C + _Z * error_C)
    return Statistics(np.exp(shift_C), low_C, high_C, p_slower_C, p_faster_C, unknown_C, unknown_C)


def _judge(
    name: str, pair: Pair, tests: Statistics, index: int, adjusted: tuple[float, float], margin: float
) -> CaseComparison:
    base, new = pair
    single = len(base) == len(new) == 1
    least = max(margin, ONE_START_MARGIN) if single else margin
    ratio = float(tests.ratio[index])
    p = adjusted[0] if ratio >= 1 else adjusted[1]
    moved = (ratio > 1 + least or ratio < 1 / (1 + least)) and p <= ALPHA
    verdict: Word = "same" if not moved else "worse" if ratio > 1 else "better"
    kruskal, delta = (float(values[index]) for values in (tests.p_kruskal, tests.delta))
    return CaseComparison(
        case=name,
        verdict=verdict,
        reason=_reason(ratio, p, least),
        base_starts=len(base),
        new_starts=len(new),
        base_us=float(np.exp(np.median(_log_medians(base)))),
        new_us=float(np.exp(np.median(_log_medians(new)))),
        ratio=ratio,
        ratio_lo=float(tests.low[index]),
        ratio_hi=float(tests.high[index]),
        p=p,
        p_kruskal=None if np.isnan(kruskal) else kruskal,
        delta=None if np.isnan(delta) else delta,
    )


def _reason(ratio: float, p: float, least: float) -> str:
    change = f"{abs(ratio - 1):.1%} {'slower' if ratio > 1 else 'faster'}"
    if p > ALPHA:
        return "no difference is shown"
    if 1 / (1 + least) <= ratio <= 1 + least:
        return f"{change}, which is within the margin of {least:.0%}"
    return change
