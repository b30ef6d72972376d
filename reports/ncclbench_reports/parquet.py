"""Parquet: the same rows and columns as CSV, typed, with unit and meaning of each column in its metadata."""

import io
from collections.abc import Sequence

from ncclbench import __version__
from ncclbench.store.run_directory import Run
from ncclbench_reports.common.record_rows import COLUMNS, flat_frame

SUFFIX = ".parquet"
FOR_FILES = True


def render(runs: Sequence[Run]) -> bytes:
    """All records of the runs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(flat_frame(runs), preserve_index=False)
    fields = [
        table.schema.field(column.name).with_metadata({"unit": column.unit, "what": column.what}) for column in COLUMNS
    ]
    metadata: dict[bytes | str, bytes | str] = {"ncclbench": __version__}
    for key, value in (table.schema.metadata or {}).items():
        metadata[key] = value
    out = io.BytesIO()
    pq.write_table(table.cast(pa.schema(fields, metadata=metadata)), out, compression="zstd")
    return out.getvalue()
