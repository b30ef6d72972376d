"""The built-in report formats: one file each, found by file name.

A format is a module with ``render(runs: Sequence[Run]) -> str | bytes``; one that also has ``SUFFIX`` is what
``ncclbench report -o FILE`` with that suffix means. ``FOR_FILES = True`` says that it is not for reading in a terminal.
Names that begin with an underscore are parts of formats.
"""
