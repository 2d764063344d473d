"""Shared services for all tests; each is started by the first test that asks for it."""

pytest_plugins = ["tests.fixtures.kafka", "tests.fixtures.clickhouse"]
