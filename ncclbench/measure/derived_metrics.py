"""What a record says beyond phases: subtotals, figures as other programs define them, and a pattern's own facts."""

from collections.abc import Mapping, Sequence

import numpy as np

from ncclbench.analysis.summary import MICRO, summarise
from ncclbench.measure.sampling import Samples
from ncclbench.schedule.rates import alg_gb_per_s
from ncclbench.schedule.schedule import Schedule
from ncclbench.store.records import ComparableRate, Subtotal, Summary


def subtotals_of(variants: Sequence[Schedule], samples: Samples) -> dict[str, Subtotal]:
    """The named sums of phases; none where phases were not timed by themselves.

    A rank's durations are added up first and the slowest rank is taken then: a rank that was late in one phase has
    waited less in the next.
    """
    named: dict[str, tuple[str, ...]] = {}
    for variant in variants:
        named |= variant.subtotals
    found = {}
    for name, labels in named.items():
        columns = [samples.labels.index(label) for label in labels if label in samples.labels]
        if columns and len(columns) == len(labels):
            seconds_N = samples.seconds_RNK[:, :, columns].sum(axis=2).max(axis=0)
            found[name] = Subtotal(labels=list(labels), time_us=summarise(seconds_N[~np.isnan(seconds_N)]))
    return found


def comparable_of(variants: Sequence[Schedule], times_us: Mapping[str, Summary | None]) -> dict[str, ComparableRate]:
    """Rates as others define them, over the median of a phase or subtotal in `times_us`; bytes are a mean variant's."""
    found = {}
    for name, one in variants[0].comparable.items():
        time_us = times_us.get(one.over)
        sizes = [variant.comparable[name].nbytes for variant in variants if name in variant.comparable]
        mean = round(sum(sizes) / len(sizes))
        if time_us is not None and time_us.p50 > 0:
            rate = alg_gb_per_s(mean, time_us.p50 / MICRO)
            found[name] = ComparableRate(gb_per_s=rate, bytes=mean, over=one.over, definition=one.definition)
    return found


def ratios_of(variants: Sequence[Schedule], times_us: Mapping[str, Summary | None]) -> dict[str, float]:
    """The medians that a pattern wants divided, where both were timed."""
    found = {}
    for variant in variants:
        for name, (over, under) in variant.ratios.items():
            one, other = times_us.get(over), times_us.get(under)
            if one is not None and other is not None and other.p50 > 0:
                found[name] = one.p50 / other.p50
    return found
