import pytest
from processes import Pool
from states import TIMEOUT, join


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Processes that communicate over gloo; jobs get their `Ranks`."""
    pool = Pool(TIMEOUT, join, str(tmp_path_factory.mktemp("ranks") / "store"))
    yield pool
    pool.close()
