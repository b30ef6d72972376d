"""Which tests may run at the same time."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A file's tests share what it starts, and labs share the machine's network: each of these stays on one worker."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        group = "lab" if item.get_closest_marker("lab") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
