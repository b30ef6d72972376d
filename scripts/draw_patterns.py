#!/usr/bin/env python3
"""Draw every pattern of the fabric catalogue from its schedule: docs/img/NAME.svg, one panel per round.

Columns are nodes, rows are rails. A flow is an arrow in the color of its sender's rail. Each group of a collective has
a color. In an uneven all-to-all, the size of a rank shows how much it receives.

    scripts/draw_patterns.py            # write them
    scripts/draw_patterns.py --check    # fail if one is not up to date
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ncclbench.schedule import AllToAllV, Case, Collective, Exchange, Ints, Phase
from ncclbench.schedule.pattern import build_variants
from ncclbench.topology import Topology, Wiring

FOLDER = Path(__file__).parents[1] / "docs/img"

# Nodes, rails, nodes per leaf, parameters, and the number of drawn rounds.
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
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
_STEP_X, _STEP_Y, _MARGIN, _TOP, _RADIUS = 62, 62, 44, 46, 13


def fabric(nodes: int, rails: int, per_leaf: int) -> Topology:
    """Nodes with one rank per rail, in rank order; each rail has a leaf for every `per_leaf` nodes."""
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
    """Sort key: near before far, and numbers as numbers, because rounds are in random order."""
    kinds = ("near", "cut", "far")
    kind = next((k for k, name in enumerate(kinds) if label.startswith(name)), 0)
    words = "".join(c if c.isdigit() else " " for c in label).split()
    return kind, [*map(int, words)], label


def _spread(phases: Sequence[Phase], shown: int) -> list[Phase]:
    """The first, the last and some between."""
    if len(phases) <= shown:
        return list(phases)
    return [phases[round(k * (len(phases) - 1) / (shown - 1))] for k in range(shown)]


def _arrowheads() -> str:
    heads = [
        f'<marker id="a{k}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
        for k, colour in enumerate(COLOURS)
    ]
    return f"<defs>{''.join(heads)}</defs>"


def _panel(phase: Phase, topology: Topology, left: int) -> Iterator[str]:
    yield f'<g transform="translate({left} 0)">'
    yield f'<text x="{_MARGIN}" y="16" font-weight="bold">{phase.label}</text>'
    for node, name in enumerate(topology.node_names):
        yield f'<text x="{_MARGIN + node * _STEP_X}" y="34" text-anchor="middle" fill="#555">{name}</text>'
    for rail in range(int(topology.rails.max()) + 1):
        yield f'<text x="2" y="{_TOP + rail * _STEP_Y + 22}" fill="#555">rail {rail}</text>'
    if isinstance(phase, Exchange):
        yield from _flows(phase, topology)
    yield from _ranks(phase, topology)
    yield "</g>"


def _place(rank: int, topology: Topology) -> tuple[float, float]:
    return _MARGIN + int(topology.nodes[rank]) * _STEP_X, _TOP + int(topology.rails[rank]) * _STEP_Y + 18


def _flows(phase: Exchange, topology: Topology) -> Iterator[str]:
    for src, dst in zip(phase.src.tolist(), phase.dst.tolist(), strict=True):
        (x1, y1), (x2, y2) = _place(src, topology), _place(dst, topology)
        length = float(np.hypot(x2 - x1, y2 - y1))
        ux, uy = (x2 - x1) / length, (y2 - y1) / length
        # To the right of the straight line, so that the two directions of a pair do not cover each other.
        bend = 8 + 0.22 * length
        cx, cy = (x1 + x2) / 2 - uy * bend, (y1 + y2) / 2 + ux * bend
        start, end = (x1 + ux * _RADIUS, y1 + uy * _RADIUS), (x2 - ux * _RADIUS, y2 - uy * _RADIUS)
        colour = int(topology.rails[src]) % len(COLOURS)
        path = f"M{start[0]:.1f} {start[1]:.1f}Q{cx:.1f} {cy:.1f} {end[0]:.1f} {end[1]:.1f}"
        yield f'<path d="{path}" fill="none" stroke="{COLOURS[colour]}" marker-end="url(#a{colour})"/>'


def _ranks(phase: Phase, topology: Topology) -> Iterator[str]:
    group_of, radius = _groups(phase, topology), _radii(phase, topology.world_size)
    for rank in range(topology.world_size):
        x, y = _place(rank, topology)
        group = int(group_of[rank])
        fill = "white" if group < 0 else COLOURS[group % len(COLOURS)]
        ink = "black" if group < 0 else "white"
        yield f'<circle cx="{x}" cy="{y}" r="{radius[rank]:.1f}" fill="{fill}" stroke="#555"/>'
        yield f'<text x="{x}" y="{y + 4}" text-anchor="middle" fill="{ink}">{rank}</text>'


def _groups(phase: Phase, topology: Topology) -> Ints:
    """The group of each rank in a collective; -1 for one in none."""
    found = np.full(topology.world_size, -1, np.int64)
    if isinstance(phase, Collective):
        for index, ranks in enumerate(phase.groups):
            # A group of one rail has that rail's color, alone or beside others.
            alone = len(np.unique(topology.rails[ranks])) == 1
            found[ranks] = topology.rails[ranks[0]] if alone else index
    return found


def _radii(phase: Phase, world_size: int) -> list[float]:
    if not isinstance(phase, AllToAllV):
        return [float(_RADIUS)] * world_size
    received = phase.rows[0].sum(axis=0)
    return [9 * float(np.sqrt(n)) for n in received / received.min()]


def main() -> int:
    """Write the drawings, or compare them with what is there."""
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
