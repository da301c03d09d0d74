"""Every test belongs to the lane whose folder it lies in."""

from pathlib import Path

import pytest

LANES = ("unit", "distributed", "integration", "contract", "gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        lane = Path(item.path).relative_to(Path(__file__).parent).parts[0]
        item.add_marker(getattr(pytest.mark, lane))
