"""The page in a real Chromium: it draws, stays within its own origin and its CSP, lives, and tells the truth."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.dashboards.conftest import RunningPage, SeededLedger, StartPage
from tests.dashboards.seed import SHIFT_GPUS

pytestmark = [pytest.mark.services, pytest.mark.browser]


class Tab:
    """A tab with all that it complained about and asked for."""

    def __init__(self, browser: Browser, **options: Any) -> None:
        given: dict[str, Any] = {"color_scheme": "light", **options}
        self.context: BrowserContext = browser.new_context(**given)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.context.on("request", lambda request: self.requests.append(request.url))

    def open(self, running: RunningPage) -> Page:
        self.page.goto(running.url)
        expect(self.page.locator(".card").first).to_be_visible(timeout=20_000)
        expect(self.page.locator('[data-state="loading"]')).to_have_count(0, timeout=20_000)
        return self.page


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    tab = Tab(browser)
    yield tab
    tab.context.close()


def luminance(colour: str) -> float:
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_everything_is_drawn_without_a_complaint_or_a_foreign_request(
    ledger: SeededLedger, start_page: StartPage, tab: Tab
) -> None:
    running = start_page(ledger)
    page = tab.open(running)
    assert page.locator('.card[data-state="ready"]').count() == page.locator(".card").count() == 17
    for panel in ("cost-by-tenant", "held-by-tenant"):
        chart = page.locator(f"#panel-{panel} .chart svg")
        expect(chart).to_be_visible()
        assert chart.locator("path").count() > 10
        label = page.locator(f"#panel-{panel} .chart").get_attribute("aria-label") or ""
        assert f"{SHIFT_GPUS} GPUs openhorizon → nordic-lm" in label
        expect(chart.get_by_text(f"{SHIFT_GPUS} GPUs openhorizon → nordic-lm")).to_be_visible()
    expect(page.locator("#panel-last-shift")).to_contain_text("320 GPUs openhorizon → nordic-lm")
    assert page.locator("#panel-money-by-pool .chart svg path").count() >= 2
    assert page.locator("#panel-running-jobs tbody tr").count() == 13
    assert page.locator("#panel-ledger-minutes svg rect").count() >= 4
    gaps = page.locator("#panel-telemetry-gaps li")
    expect(gaps.nth(0)).to_contain_text("1 batch · spool full, perhaps sent")
    expect(gaps.nth(1)).to_contain_text(re.compile(r"narvik-h100-0007\s*2 h 0 min.* · 720 batches · spool full$"))
    expect(page.locator("#alert-badge")).to_have_text("1 alert · €164.00/h at stake")
    expect(page).to_have_title(re.compile(r"^€0\.\d{4}/s · Narvik$"))
    page.wait_for_timeout(1500)
    assert tab.complaints == []
    assert tab.requests
    assert all(url.startswith(running.url) for url in tab.requests)


def test_the_sum_stands_in_the_middle_of_its_ring(ledger: SeededLedger, start_page: StartPage, tab: Tab) -> None:
    panel = tab.open(start_page(ledger)).locator("#panel-money-by-pool")
    expect(panel.locator(".total b").first).to_be_visible()
    ring, first, last = (
        panel.locator(part).bounding_box() for part in (".chart svg", ".total b >> nth=0", ".total span >> nth=-1")
    )
    assert ring and first and last
    middle = (first["y"] + last["y"] + last["height"]) / 2
    assert abs(middle - (ring["y"] + ring["height"] / 2)) < 3


def test_the_numbers_are_those_of_the_ledger(ledger: SeededLedger, start_page: StartPage, tab: Tab) -> None:
    page = tab.open(start_page(ledger))
    midnight = ledger.seed.now.replace(hour=0, minute=0, second=0, microsecond=0)
    charges = [row for row in ledger.seed.newest("charges") if row["interval_start"] >= midnight]
    spent = sum((row["asset_cost"] for row in charges), Decimal(0))
    value = page.locator("#panel-spent-today .stat-value")
    expect(value).to_have_text(f"€{spent:,.2f}")
    exact = value.get_attribute("title") or ""
    assert Decimal(exact.removesuffix(" EUR")) == spent, "hovering shows every digit"
    states = page.locator("#panel-fleet-now .share-list li")
    assert sum(Decimal(row.locator(".n").get_attribute("title") or "0") for row in states.all()) == 1000


def test_a_change_in_the_ledger_arrives_by_itself(ledger: SeededLedger, start_page: StartPage, tab: Tab) -> None:
    page = tab.open(start_page(ledger))
    expect(page.locator("#panel-held-by-tenant .legend")).not_to_contain_text("newcomer")
    row = {"pool": "narvik-h100", "tenant": "newcomer", "kind": "held", "activity": "active", "gpu_us": 42 * 60_000_000}
    more = {"minute": ledger.seed.minute, "version": 100, "complete": 0}
    with ledger.client() as client:
        client.insert("ledger_minute", [[*row.values(), *more.values()]], column_names=[*row, *more])
        try:
            entry = page.locator("#panel-held-by-tenant .legend button", has_text="newcomer")
            expect(entry).to_contain_text("42", timeout=15_000)
        finally:
            client.command("DELETE FROM ledger_minute WHERE tenant = 'newcomer'")
    expect(entry).to_have_count(0, timeout=15_000)
    assert sum("/events" in url for url in tab.requests) == 1, "one stream per tab"
    assert tab.complaints == []


def test_the_theme_is_the_systems_until_chosen_and_then_kept(
    ledger: SeededLedger, start_page: StartPage, browser: Browser
) -> None:
    running = start_page(ledger)
    tab = Tab(browser, color_scheme="dark")
    page = tab.open(running)
    root, button = page.locator("html"), page.locator("#theme")
    expect(root).to_have_attribute("data-theme", "dark")
    button.click()
    expect(root).to_have_attribute("data-theme", "light")
    expect(button).to_have_attribute("aria-label", re.compile("light"))
    page.reload()
    expect(root).to_have_attribute("data-theme", "light")
    button.click()
    expect(root).to_have_attribute("data-theme", "dark")
    assert tab.complaints == []
    tab.context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_the_contrast_that_people_need(
    ledger: SeededLedger, start_page: StartPage, browser: Browser, theme: str
) -> None:
    tab = Tab(browser, color_scheme=theme)
    page = tab.open(start_page(ledger))
    pairs: list[list[str]] = page.evaluate(
        """() => {
          const solid = (node) => {
            for (let at = node; at; at = at.parentElement) {
              const colour = getComputedStyle(at).backgroundColor;
              if (/^rgb\\(/.test(colour)) return colour;
            }
            return getComputedStyle(document.body).backgroundColor;
          };
          const words = (node) => [...node.childNodes].some((one) => one.nodeType === 3 && one.textContent.trim());
          const apart = "svg, .skip, .sr, noscript, script";
          return [...document.querySelectorAll("body *")]
            .filter((node) => words(node) && node.checkVisibility() && !node.closest(apart))
            .map((node) => [getComputedStyle(node).color, solid(node), node.textContent.trim().slice(0, 40)]);
        }"""
    )
    assert len(pairs) > 150
    poor: list[str] = []
    for ink, paper, text in pairs:
        light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
        if (light + 0.05) / (dark + 0.05) < 4.5:
            poor.append(f"{text!r}: {ink} on {paper}")
    assert poor == []
    tab.context.close()


def test_an_outage_shows_the_age_of_the_figures_and_ends_by_itself(
    ledger: SeededLedger, start_page: StartPage, tab: Tab
) -> None:
    running = start_page(ledger)
    page = tab.open(running)
    running.source.away = True
    notice = page.locator("#notice")
    expect(notice).to_contain_text("The database does not answer.", timeout=15_000)
    expect(notice).to_contain_text(re.compile(r"These figures are of \d\d:\d\d:\d\d UTC"))
    expect(page.locator("#status-badge")).to_have_text("Database away")
    expect(page.locator("#panel-spent-today")).to_have_attribute("data-state", "stale")
    expect(page.locator("#panel-spent-today .stat-value")).to_contain_text("€")
    running.source.away = False
    expect(notice).to_be_hidden(timeout=15_000)
    expect(page.locator("#panel-spent-today")).to_have_attribute("data-state", "ready")
    assert tab.complaints == []


def test_a_page_that_is_gone_is_told(ledger: SeededLedger, start_page: StartPage, tab: Tab) -> None:
    running = start_page(ledger)
    page = tab.open(running)
    running.server.should_exit = True
    expect(page.locator("#notice")).to_contain_text("No connection to GPULedger.", timeout=15_000)
    expect(page.locator("#status-badge")).to_have_text("No connection")


def test_an_empty_ledger_says_what_to_do(empty_ledger: SeededLedger, start_page: StartPage, tab: Tab) -> None:
    page = tab.open(start_page(empty_ledger))
    expect(page.locator("#panel-spent-today")).to_contain_text("gpuledger rates apply FILE")
    expect(page.locator("#panel-cost-by-tenant")).to_contain_text("Start a worker")
    expect(page.locator("#panel-alerts")).to_contain_text("No alert is firing.")
    expect(page.locator("#panel-telemetry-gaps")).to_contain_text("No spool has dropped telemetry in the last day.")
    expect(page.locator("#status-badge")).to_have_text("Ledger waits for data")
    assert tab.complaints == []


def test_keyboard_reaches_series_tables_and_explanations(ledger: SeededLedger, start_page: StartPage, tab: Tab) -> None:
    page = tab.open(start_page(ledger))
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    about = page.get_by_role("button", name="About Cost per second by tenant")
    about.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#panel-cost-by-tenant-about")).to_be_visible()
    series = page.locator("#panel-held-by-tenant .legend button", has_text="openhorizon")
    series.focus()
    page.keyboard.press("Space")
    expect(series).to_have_attribute("aria-pressed", "false")
    expect(series).to_be_focused()
    table = page.get_by_role("button", name="Cost per second by tenant as a table")
    table.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#panel-cost-by-tenant table tbody tr").first).to_be_visible()
    assert tab.complaints == []


def test_tables_sort_by_amount_not_by_letters(ledger: SeededLedger, start_page: StartPage, tab: Tab) -> None:
    page = tab.open(start_page(ledger))
    card = page.locator("#panel-running-jobs")
    card.get_by_role("button", name="GPUs", exact=True).click()
    column = [cell.inner_text() for cell in card.locator("tbody td:nth-child(4)").all()]
    assert [int(text) for text in column] == sorted((int(text) for text in column), reverse=True)
    expect(card.locator("th[aria-sort]")).to_have_attribute("aria-sort", "descending")


def test_names_from_the_database_are_text_never_markup(ledger: SeededLedger, start_page: StartPage, tab: Tab) -> None:
    nasty = "<img src=x onerror=console.log('hurt')>"
    row = {"pool": "narvik-h100", "tenant": nasty, "kind": "held", "activity": "active", "gpu_us": 60_000_000}
    more = {"minute": ledger.seed.minute - timedelta(minutes=1), "version": 100, "complete": 0}
    with ledger.client() as client:
        client.insert("ledger_minute", [[*row.values(), *more.values()]], column_names=[*row, *more])
        try:
            page = tab.open(start_page(ledger))
            expect(page.locator("#panel-held-by-tenant .legend", has_text="<img src=x")).to_be_visible()
            assert page.locator("main img").count() == 0
        finally:
            client.command("DELETE FROM ledger_minute WHERE startsWith(tenant, '<img')")
    assert tab.complaints == []


@pytest.mark.parametrize("width", [360, 768, 1440])
def test_no_width_needs_sideways_scrolling(
    ledger: SeededLedger, start_page: StartPage, browser: Browser, width: int
) -> None:
    tab = Tab(browser, viewport={"width": width, "height": 800})
    page = tab.open(start_page(ledger))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    tab.context.close()
