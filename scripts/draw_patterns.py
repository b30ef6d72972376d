#!/usr/bin/env python3
"""Draw every fabric pattern from its own schedule: docs/img/NAME.svg, one panel per round.

Columns are nodes, rows are rails. A flow is an arrow in the color of its sender's rail. Each group of a collective has
a color of its own. In an uneven all-to-all, the size of a rank shows the bytes that it receives.

    scripts/draw_patterns.py            # write the drawings
    scripts/draw_patterns.py --check    # fail if a drawing is not up to date
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from ncclbench.schedule import AllToAllV, Case, Collective, Concurrent, Exchange, Ints, Local, Phase, RowWork
from ncclbench.schedule.pattern import build_variants
from ncclbench.topology import Topology, Wiring

Floats = NDArray[np.float64]
FOLDER = Path(__file__).parents[1] / "docs/img"

# Nodes, rails, nodes per leaf, parameters, and the number of rounds that are drawn.
DRAWN: dict[str, tuple[int, int, int, dict[str, object], int]] = {
    "same_rail": (4, 2, 4, {}, 3),
    "cross_rail": (4, 2, 4, {}, 3),
    "leaf_contrast": (4, 2, 2, {}, 3),
    "bisection": (8, 2, 8, {}, 3),
    "permutation": (4, 2, 4, {"rounds": 3}, 3),
    "incast": (4, 2, 4, {"senders": 2}, 2),
    "rail_groups": (4, 2, 4, {}, 3),
    "rail_hot": (4, 2, 4, {}, 3),
    "ring": (4, 2, 4, {}, 2),
    "domain_straddle": (4, 4, 4, {}, 3),
    "pairs": (4, 2, 4, {}, 3),
}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
_STEP_X, _STEP_Y, _MARGIN, _TOP, _RADIUS = 62, 62, 44, 46, 13


def fabric(nodes: int, rails: int, per_leaf: int) -> Topology:
    """A topology with one rank per node and rail, and one leaf per rail and `per_leaf` nodes."""
    ranks = np.arange(nodes * rails)
    leaves = ranks // rails // per_leaf * rails + ranks % rails
    unknown = np.full(len(ranks), np.nan)
    count = int(leaves.max()) + 1
    wiring = Wiring(
        devices=("",) * len(ranks),
        nic_gbit_per_s=unknown,
        leaves=leaves,
        leaf_names=tuple(f"leaf{k}" for k in range(count)),
        uplinks=np.ones(count, np.int64),
        uplink_gbit_per_s=unknown[:count],
        domain_gbit_per_s=unknown,
    )
    return Topology(
        nodes=ranks // rails,
        domains=ranks // rails,
        rails=ranks % rails,
        sites=np.zeros_like(ranks),
        node_names=tuple(f"n{k}" for k in range(nodes)),
        wiring=wiring,
    )


def drawing(pattern: str) -> str:
    """The SVG of a pattern."""
    nodes, rails, per_leaf, params, shown = DRAWN[pattern]
    topology = fabric(nodes, rails, per_leaf)
    variants = build_variants(Case(pattern=pattern, nbytes=1 << 12, params=params), topology)
    phases = sorted((one.phases[0] for one in variants), key=lambda phase: _order(phase.label))
    width, height = _MARGIN + nodes * _STEP_X, _TOP + rails * _STEP_Y + 8
    picked = _spread(phases, shown)
    body = [line for k, phase in enumerate(picked) for line in _panel(phase, topology, k * width)]
    note = f"{len(picked)} of {len(phases)} rounds" if len(picked) < len(phases) else f"{len(phases)} rounds"
    size = f'width="{len(picked) * width}" height="{height + 18}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
            '<rect width="100%" height="100%" fill="white"/>',
            _arrowheads(),
            *body,
            f'<text x="8" y="{height + 10}" fill="#555">{pattern} on {nodes} nodes of {rails} rails: {note}</text>',
            "</svg>\n",
        ]
    )


def _order(label: str) -> tuple[int, list[int], str]:
    """A sort key, since rounds come in random order: near before far, and numbers by value."""
    kinds = ("near", "cut", "far")
    kind = next((k for k, name in enumerate(kinds) if label.startswith(name)), 0)
    words = "".join(c if c.isdigit() else " " for c in label).split()
    return kind, [*map(int, words)], label


def _spread(phases: Sequence[Phase], shown: int) -> list[Phase]:
    """`shown` phases at equal distances, the first and the last included."""
    if len(phases) <= shown:
        return list(phases)
    return [phases[round(k * (len(phases) - 1) / (shown - 1))] for k in range(shown)]


def _arrowheads() -> str:
    heads = [
        f'<marker id="a{k}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{color}"/></marker>'
        for k, color in enumerate(COLORS)
    ]
    return f"<defs>{''.join(heads)}</defs>"


def _panel(phase: Phase, topology: Topology, left: int) -> Iterator[str]:
    yield f'<g transform="translate({left} 0)">'
    yield f'<text x="{_MARGIN}" y="16" font-weight="bold">{phase.label}</text>'
    for node, name in enumerate(topology.node_names):
        yield f'<text x="{_MARGIN + node * _STEP_X}" y="34" text-anchor="middle" fill="#555">{name}</text>'
    for rail in range(int(topology.rails.max()) + 1):
        yield f'<text x="2" y="{_TOP + rail * _STEP_Y + 22}" fill="#555">rail {rail}</text>'
    group_R, radius_R = np.full(topology.world_size, -1, np.int64), np.full(topology.world_size, float(_RADIUS))
    match phase:
        case Exchange():
            yield from _flows(phase, topology)
        case Collective():
            group_R = _groups(phase, topology)
        case AllToAllV():
            received = phase.rows[0].sum(axis=0)
            radius_R = 9 * np.sqrt(received / received.min())
        case Local() | RowWork() | Concurrent():
            raise ValueError(f"{phase.label}: phases of this kind have no drawing")
        case _:
            assert_never(phase)
    yield from _ranks(group_R, radius_R, topology)
    yield "</g>"


def _position(rank: int, topology: Topology) -> tuple[float, float]:
    return _MARGIN + int(topology.nodes[rank]) * _STEP_X, _TOP + int(topology.rails[rank]) * _STEP_Y + 18


def _flows(phase: Exchange, topology: Topology) -> Iterator[str]:
    for src, dst in zip(phase.src.tolist(), phase.dst.tolist(), strict=True):
        (x1, y1), (x2, y2) = _position(src, topology), _position(dst, topology)
        length = float(np.hypot(x2 - x1, y2 - y1))
        ux, uy = (x2 - x1) / length, (y2 - y1) / length
        # Bend to the right, so that the two directions of a pair do not overlap.
        bend = 8 + 0.22 * length
        cx, cy = (x1 + x2) / 2 - uy * bend, (y1 + y2) / 2 + ux * bend
        start, end = (x1 + ux * _RADIUS, y1 + uy * _RADIUS), (x2 - ux * _RADIUS, y2 - uy * _RADIUS)
        color = int(topology.rails[src]) % len(COLORS)
        path = f"M{start[0]:.1f} {start[1]:.1f}Q{cx:.1f} {cy:.1f} {end[0]:.1f} {end[1]:.1f}"
        yield f'<path d="{path}" fill="none" stroke="{COLORS[color]}" marker-end="url(#a{color})"/>'


def _ranks(group_R: Ints, radius_R: Floats, topology: Topology) -> Iterator[str]:
    for rank in range(topology.world_size):
        x, y = _position(rank, topology)
        group = int(group_R[rank])
        fill = "white" if group < 0 else COLORS[group % len(COLORS)]
        ink = "black" if group < 0 else "white"
        yield f'<circle cx="{x}" cy="{y}" r="{radius_R[rank]:.1f}" fill="{fill}" stroke="#555"/>'
        yield f'<text x="{x}" y="{y + 4}" text-anchor="middle" fill="{ink}">{rank}</text>'


def _groups(phase: Collective, topology: Topology) -> Ints:
    """The color index of each rank's group, shape (R,); -1 for a rank in none."""
    found = np.full(topology.world_size, -1, np.int64)
    for index, ranks in enumerate(phase.groups):
        # A group of one rail keeps that rail's color, whether it runs alone or beside others.
        alone = len(np.unique(topology.rails[ranks])) == 1
        found[ranks] = topology.rails[ranks[0]] if alone else index
    return found


def main() -> int:
    """Write the drawings, or compare them with the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a drawing is not up to date")
    check = parser.parse_args().check
    stale = []
    for pattern in DRAWN:
        file, text = FOLDER / f"{pattern}.svg", drawing(pattern)
        if not file.exists() or file.read_text() != text:
            stale.append(file.name)
            if not check:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
    print(f"{'not up to date' if check else 'written'}: {', '.join(stale) or 'none'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
