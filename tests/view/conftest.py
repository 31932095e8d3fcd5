"""A run that is served, and what asks the server, for the tests of a file."""

import pytest
from rigs.served import opened, served_at


@pytest.fixture(scope="module")
def served(explained_coder):
    return opened(explained_coder)


@pytest.fixture(scope="module")
def ask(served):
    with served_at(served) as asks:
        yield asks
