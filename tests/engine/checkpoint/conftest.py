import pytest
from processes import Pool
from states import TIMEOUT, join


@pytest.fixture(scope="session")
def team(tmp_path_factory):
    """Processes that communicate over gloo; jobs get their `Team`."""
    pool = Pool(TIMEOUT, join, str(tmp_path_factory.mktemp("team") / "store"))
    yield pool
    pool.close()
