"""Which tests must stay in one process where several run at a time (``pytest -n 2 --dist loadgroup``)."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of a file share its fixtures. The tests of the fabric lab share the network of this machine."""
    for item in items:
        file = item.path.relative_to(HERE)
        item.add_marker(pytest.mark.xdist_group("lab" if file.parts[0] == "lab" else str(file)))
