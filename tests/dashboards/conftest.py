"""What the dashboards' tests share: a seeded ledger on the real engine, the page on it, and a real browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from clickhouse_connect.driver.client import Client
from playwright.sync_api import Browser, sync_playwright

from gpuledger.dashboards.exceptions import SourceUnavailable
from gpuledger.dashboards.page.app import PageSettings, create_app
from gpuledger.dashboards.page.server import PageServer
from gpuledger.dashboards.page.source import ClickHouseSource, Result
from gpuledger.local.exceptions import AssetError
from gpuledger.local.jars import echarts_file
from gpuledger.schemas.migrate import migrate
from tests.dashboards.seed import Seed, make_seed, store
from tests.fixtures.clickhouse import ClickHouse

_CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass(frozen=True)
class SeededLedger:
    """A database with tables, views and (unless empty) the seed's rows."""

    server: ClickHouse
    name: str
    seed: Seed

    def client(self) -> Client:
        return self.server.client(self.name)

    def source(self) -> ClickHouseSource:
        return ClickHouseSource({"host": self.server.host, "port": self.server.port, "database": self.name})


def _database(server: ClickHouse, name: str, seed: Seed | None) -> SeededLedger:
    with server.client() as client:
        client.command(f"CREATE DATABASE {name}")
    with server.client(name) as client:

        def execute(sql: str, parameters: dict[str, object] | None = None, /) -> object:
            return client.command(sql, parameters=parameters)

        migrate(lambda sql: client.query(sql).result_rows, execute)
        if seed is not None:
            store(client, seed)
    return SeededLedger(server, name, seed or Seed(datetime.now(UTC), datetime.now(UTC)))


@pytest.fixture(scope="module")
def ledger(clickhouse: ClickHouse, request: pytest.FixtureRequest) -> Iterator[SeededLedger]:
    """The seeded ledger, fresh for each module: live views look at the last minutes."""
    name = "seeded_" + request.module.__name__.rpartition(".")[2]
    yield _database(clickhouse, name, make_seed(datetime.now(UTC)))
    with clickhouse.client() as client:
        client.command(f"DROP DATABASE {name} SYNC")


@pytest.fixture(scope="module")
def empty_ledger(clickhouse: ClickHouse, request: pytest.FixtureRequest) -> Iterator[SeededLedger]:
    name = "empty_" + request.module.__name__.rpartition(".")[2]
    yield _database(clickhouse, name, None)
    with clickhouse.client() as client:
        client.command(f"DROP DATABASE {name} SYNC")


@pytest.fixture(scope="session")
def echarts() -> Path:
    try:
        return echarts_file()
    except AssetError as error:
        pytest.skip(f"the chart library is not cached and cannot be fetched: {error}")


class SwitchedSource:
    """The real source behind a switch: `away` makes it fail as it does when the server is gone."""

    def __init__(self, source: ClickHouseSource) -> None:
        self.source = source
        self.away = False
        self.asked: list[str] = []

    def query(self, sql: str, /) -> Result:
        self.asked.append(sql)
        if self.away:
            raise SourceUnavailable("connection refused to db.internal:8123 as secret-user")
        return self.source.query(sql)

    def close(self) -> None:
        self.source.close()


@dataclass(frozen=True)
class RunningPage:
    url: str
    source: SwitchedSource
    server: PageServer


StartPage = Callable[..., RunningPage]


@pytest.fixture
def start_page(echarts: Path) -> Iterator[StartPage]:
    """Starts pages on free ports of loopback and stops them after the test."""
    started: list[tuple[PageServer, Any]] = []

    def start(ledger: SeededLedger, **settings: Any) -> RunningPage:
        source = SwitchedSource(ledger.source())
        given: dict[str, Any] = {"title": "Narvik", "refresh_ms": 200, **settings}
        server = PageServer(create_app(PageSettings(echarts=echarts, **given), source), "127.0.0.1", 0)
        started.append((server, server.start_in_thread()))
        return RunningPage(server.url, source, server)

    yield start
    for server, _ in started:
        server.should_exit = True
    for _, thread in started:
        thread.join(10)
        assert not thread.is_alive(), "the page did not stop within 10 s"


def _chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("GPULEDGER_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real Chromium."""
    path = _chromium()
    if path is None:
        pytest.skip("no Chromium: install Debian's chromium or name one in GPULEDGER_CHROMIUM")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, headless=True, args=_CHROMIUM_FLAGS)
        yield chromium
        chromium.close()
