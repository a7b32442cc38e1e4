import pytest
from crew import Crew


@pytest.fixture(scope="session")
def crew():
    """Processes that train together, for all tests that want some."""
    crew = Crew()
    yield crew
    crew.close()
