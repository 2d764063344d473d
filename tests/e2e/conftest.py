"""The recorded load, and what an undisturbed run makes of it: both once for all end-to-end tests."""

from collections.abc import Iterator

import pytest

from tests.e2e.load import Load, record
from tests.e2e.pipeline import Digest, Installation, installation
from tests.fixtures.clickhouse import ClickHouse


@pytest.fixture(scope="session")
def load() -> Load:
    return record(ticks=270)


@pytest.fixture(scope="session")
def undisturbed(kafka: str, clickhouse: ClickHouse, load: Load, tmp_path_factory: pytest.TempPathFactory) -> Digest:
    """The digest of one worker that nothing happens to."""
    with installation(kafka, clickhouse.url, tmp_path_factory.mktemp("undisturbed")) as quiet:
        sending = quiet.publish(load.ticks, over_s=4)
        quiet.start_worker()
        quiet.settle(load, sending.result())
        return quiet.digest(load)


@pytest.fixture
def pipeline(kafka: str, clickhouse: ClickHouse, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """An installation of this test's own."""
    with installation(kafka, clickhouse.url, tmp_path_factory.mktemp("pipeline")) as made:
        yield made
