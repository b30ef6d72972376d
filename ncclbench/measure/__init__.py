"""Warm-up, timing regimes, sampling, statistics, and one case from schedule to record."""
