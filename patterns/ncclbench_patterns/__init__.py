"""The built-in patterns: one file each, found by file name.

A pattern is a module with a class `Params` and a pure function ``schedule(case, topology) -> Schedule``, or a function
``variants`` with several schedules. It describes which rank sends what to which rank, and sends nothing itself.
`ncclbench.schedule.pattern` lists what else a module may define. ``ncclbench list patterns`` shows the first line of
its docstring.
"""
