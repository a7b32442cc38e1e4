import pytest
from team import Team


@pytest.fixture(scope="session")
def team(tmp_path_factory):
    """Processes that talk over gloo, for all tests that want some."""
    team = Team(tmp_path_factory.mktemp("team"))
    yield team
    team.close()
