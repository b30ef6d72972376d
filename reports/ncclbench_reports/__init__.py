"""The built-in report formats: one file each, found by file name.

A format is a module with ``render(runs: Sequence[Run]) -> str``.
"""
