"""Other tools' logs, read into records: one file a format, found by its name.

A module here is an importer if its name does not begin with an underscore. It has

    def recognises(log: Log) -> bool        whether there is anything of this format in the log
    def read(log: Log, stated: Stated) -> Reading

and says in its docstring's first line what it reads. Other distributions add theirs through an entry point in the
group ``ncclbench.importers``. What a log does not say stays None; a figure is never made up.
"""
