"""The result of every flow of a round by itself: point-to-point patterns are never averaged over their flows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ncclbench.measure.sampling import Samples
from ncclbench.measure.statistics import MICRO, Floats
from ncclbench.schedule.phases import Exchange
from ncclbench.schedule.schedule import Schedule

# Flows summarised at once: of thousands with a thousand samples each, all would be gigabytes.
_BLOCK = 256


def flow_results(label: str, variants: Sequence[Schedule], samples: Samples) -> dict[str, Any] | None:
    """Medians of each flow of the exchange called `label`; None where flows cannot be told apart.

    Keys, lists of one entry a flow: ``src``, ``dst``, ``nbytes``, ``p50_us`` (of the longer of the two ends'
    durations in each iteration), ``send_p50_us`` and ``recv_p50_us`` (of each end by itself).
    """
    owners = [(k, phase) for k, one in enumerate(variants) for phase in one.phases if phase.label == label]
    if len(owners) != 1 or samples.mixed or not isinstance(owners[0][1], Exchange):
        return None
    (turn, phase), column = owners[0], samples.labels.index(label) if label in samples.labels else 0
    if column == 0 and len(variants[turn].phases) > 1:
        return None
    seconds_RN = samples.seconds_RNK[:, turn :: len(variants), column]
    wire = phase.src != phase.dst
    src, dst = phase.src[wire], phase.dst[wire]
    if not len(src):
        return None
    ends_R = np.median(seconds_RN, axis=1) * MICRO
    return {
        "src": src.tolist(),
        "dst": dst.tolist(),
        "nbytes": phase.nbytes[wire].tolist(),
        "p50_us": _longer_ends(seconds_RN, src, dst).tolist(),
        "send_p50_us": ends_R[src].tolist(),
        "recv_p50_us": ends_R[dst].tolist(),
    }


def _longer_ends(seconds_RN: Floats, src: np.ndarray, dst: np.ndarray) -> Floats:  # type: ignore[type-arg]
    blocks = [slice(k, k + _BLOCK) for k in range(0, len(src), _BLOCK)]
    medians = [np.median(np.maximum(seconds_RN[src[b]], seconds_RN[dst[b]]), axis=1) for b in blocks]
    return np.asarray(np.concatenate(medians) * MICRO, dtype=np.float64)
