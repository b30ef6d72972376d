"""Pure functions over runs: flows, intervals, summaries, comparisons and their statistics."""
