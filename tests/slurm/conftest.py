"""The Slurm cluster that tests share, one for the whole run."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A cluster of two nodes; commands reach it through its `env`, other tests do not see it."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def cleared(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test leaves in the queue ends before the next one starts."""
    yield
    if "slurm" in request.fixturenames:
        request.getfixturevalue("slurm").clear()
