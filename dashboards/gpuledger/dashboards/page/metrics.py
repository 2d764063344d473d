"""The page's own counters in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from gpuledger.dashboards.page.feed import Feed

__all__ = ["metrics_text"]


def _lines(feed: Feed, streams: int) -> Iterator[tuple[str, str, str, float]]:
    stats = feed.stats
    yield "gpuledger_page_streams", "gauge", "Open event streams.", streams
    yield "gpuledger_page_refreshes_total", "counter", "Refreshes of the board.", stats.refreshes
    yield "gpuledger_page_queries_total", "counter", "Queries sent to the database.", stats.queries
    yield "gpuledger_page_query_seconds_total", "counter", "Time spent waiting for queries.", stats.query_seconds
    yield "gpuledger_page_queries_failed_total", "counter", "Queries that the database refused.", stats.failed
    yield "gpuledger_page_database_unavailable_total", "counter", "Times it did not answer.", stats.unavailable
    yield "gpuledger_page_database_up", "gauge", "1 while the database answers.", int(not feed.database_error)
    if feed.refreshed_at is not None:
        at = feed.refreshed_at.timestamp()
        yield "gpuledger_page_refreshed_timestamp_seconds", "gauge", "When the figures were read.", at


def metrics_text(feed: Feed, streams: int) -> str:
    """One block of HELP, TYPE and value per metric."""
    return "".join(
        f"# HELP {name} {text}\n# TYPE {name} {kind}\n{name} {number:.17g}\n"
        for name, kind, text, number in _lines(feed, streams)
    )
