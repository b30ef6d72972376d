"""The built-in report formats: one file each, found by file name.

A format is a module with ``render(runs: Sequence[Run]) -> str | bytes``. Its ``SUFFIX`` selects it for
``ncclbench report -o FILE``. ``FOR_FILES = True`` keeps it out of a terminal. Parts of formats are in `common` and
`html_page`.
"""
