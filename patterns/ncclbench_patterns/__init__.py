"""The built-in patterns: one file each, found by file name.

A pattern is a module with a class `Params` and a pure function ``schedule(case, topology) -> Schedule``. It says who
sends what to whom; it never sends anything. The first line of its docstring is what ``ncclbench list patterns`` shows.
"""
