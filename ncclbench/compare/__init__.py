"""Is NEW slower than BASE? Each case over the process starts of both, and a verdict with its reason.

A process start is what varies: two runs of the same program on the same machines differ by more than their iterations
tell, since memory, routes and cores are chosen anew. So the medians of the starts are the data, and iterations only
make each of them sharp.
"""

from ncclbench.compare.alike import differences
from ncclbench.compare.compare import CaseComparison, Comparison, compare
from ncclbench.compare.sides import Side, read_side

__all__ = ["CaseComparison", "Comparison", "Side", "compare", "differences", "read_side"]
