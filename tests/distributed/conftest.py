from collections.abc import Iterator

import pytest

from tests.support.ranks import RankPool


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    """Four ranks on two pretended hosts, so that table_row_wise and grid_shard have hosts to stay in."""
    pool = RankPool(4, num_hosts=2)
    yield pool
    pool.close()
