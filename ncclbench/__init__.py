"""Collective-communication benchmark and acceptance suite for GPU clusters.

The package measures how fast collectives and point-to-point patterns really go, with the slowest rank of every
iteration as the headline, and keeps every sample. ``docs/architecture.md`` shows how the rooms hang together.

Importing this package loads nothing heavy: torch, mpi4py, cupy, NumPy and pandas arrive when a room needs them.
"""

__version__ = "0.1.0.dev0"
