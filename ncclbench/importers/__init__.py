"""Importers of other tools' logs: one file per format, found by its name.

Each module in this package is an importer. It has

    def recognises(log: Log) -> bool        whether the log has anything in this format
    def read(log: Log, stated: Stated) -> Reading

and says in its docstring's first line what it reads. Other distributions add theirs through an entry point in the
group ``ncclbench.importers``. A value that a log does not have stays None; no figure is ever made up.
"""
