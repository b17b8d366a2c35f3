"""The HTML report in a real browser: `pytest -m browser`, with Chromium installed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browsers import ask, chromium, look
from report_attacks import ATTACKS, SHOWN_CONTROL, hostile
from saved_plans import llama_70b
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from shardlab.compare import rank
from shardlab.report.html.case import case_report
from shardlab.report.html.comparison import comparison_report
from shardlab.report.html.review import diff_report
from shardlab.report.html.write import html_of
from shardlab.review import diff

pytestmark = pytest.mark.browser
TABS = ["overview", "bytes", "collectives", "mesh", "timeline", "memory", "audit"]
SHOWN = "return [...document.querySelectorAll('main > section')].filter(s => !s.hidden).map(s => s.id)"
ROWS = "return [...document.querySelectorAll('[data-listing] tbody tr')].filter(r => !r.hidden)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of Llama 3 70B on 512 H100s. SHARDLAB_REPORT_PAGE: keep it there, to look at it."""
    kept = os.environ.get("SHARDLAB_REPORT_PAGE")
    path = Path(kept) if kept else tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html_of(case_report(llama_70b())), encoding="utf-8")
    assert path.stat().st_size < 3_000_000
    return path.as_uri()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(started: webdriver.Chrome, page: str) -> Iterator[webdriver.Chrome]:
    """The page just opened; and that it said nothing on the console and asked for nothing."""
    look(started, 1280, 900)
    started.get(page)
    yield started
    assert started.get_log("browser") == []
    assert ask(started, "return performance.getEntriesByType('resource').length") == 0


def tab(browser: webdriver.Chrome, name: str) -> None:
    browser.find_element(By.ID, f"tab-{name}").click()


def test_the_first_paint_comes_within_a_second(browser: webdriver.Chrome, page: str) -> None:
    """The best of three loads: other work on the machine is not the page's."""
    script = "return performance.getEntriesByType('paint').map(e => e.startTime)"
    found = []
    for _ in range(3):
        browser.get(page)
        found.append(max(WebDriverWait(browser, 20).until(lambda one: ask(one, script))))
    assert min(found) < 1000


def test_every_tab_shows_its_part_alone(browser: webdriver.Chrome) -> None:
    assert ask(browser, SHOWN) == ["overview"]
    names = [
        one.get_attribute("aria-controls") for one in browser.find_elements(By.CSS_SELECTOR, "[role=tab]")
    ]
    assert names == TABS
    for name in TABS:
        tab(browser, name)
        assert ask(browser, SHOWN) == [name]
        selected = browser.find_elements(By.CSS_SELECTOR, "[role=tab][aria-selected=true]")
        assert [one.get_attribute("aria-controls") for one in selected] == [name]
        panel = browser.find_element(By.ID, name)
        assert panel.get_attribute("role") == "tabpanel"
        assert browser.current_url.endswith(f"#{name}")


def test_tabs_go_by_the_keyboard_round_and_round(browser: webdriver.Chrome) -> None:
    first = browser.find_element(By.ID, "tab-overview")
    first.send_keys(Keys.ARROW_LEFT)
    assert ask(browser, SHOWN) == [TABS[-1]]
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert ask(browser, SHOWN) == [TABS[1]]
    browser.switch_to.active_element.send_keys(Keys.END)
    browser.switch_to.active_element.send_keys(Keys.HOME)
    assert ask(browser, SHOWN) == [TABS[0]]
    outline = ask(browser, "return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_a_link_opens_its_tab(browser: webdriver.Chrome, page: str) -> None:
    browser.get(f"{page}#mesh")
    browser.refresh()
    assert ask(browser, SHOWN) == ["mesh"]


def test_every_filter_shows_what_it_says(browser: webdriver.Chrome) -> None:
    """Counted in the analysis itself."""
    found = llama_70b().analysis
    assert found is not None
    tab(browser, "collectives")
    wanted = [
        Counter(row.kind for row in found.collectives),
        Counter("+".join(row.axes or ()) for row in found.collectives),
        Counter(row.phase for row in found.collectives),
        Counter(row.tier for row in found.collectives),
    ]
    filters = browser.find_elements(By.CSS_SELECTOR, "[data-filter]")
    assert len(filters) == len(wanted)
    for element, counts in zip(filters, wanted, strict=True):
        select = Select(element)
        assert [one.text for one in select.options] == ["all", *sorted(counts)]
        for choice, count in counts.items():
            select.select_by_visible_text(choice)
            assert len(ask(browser, ROWS)) == count
            said = browser.find_element(By.CSS_SELECTOR, "[data-listing] output").text
            assert said == f"{count} of {len(found.collectives)}"
        select.select_by_visible_text("all")
    assert len(ask(browser, ROWS)) == len(found.collectives)


def test_filters_meet_and_are_cleared(browser: webdriver.Chrome) -> None:
    found = llama_70b().analysis
    assert found is not None
    tab(browser, "collectives")
    Select(browser.find_elements(By.CSS_SELECTOR, "[data-filter]")[1]).select_by_visible_text("tensor")
    browser.find_element(By.CSS_SELECTOR, "[data-find]").send_keys("MLP")
    wanted = [row for row in found.collectives if row.axes == ("tensor",) and "mlp" in row.layer]
    assert len(ask(browser, ROWS)) == len(wanted) > 0
    browser.find_element(By.CSS_SELECTOR, "[data-listing] [type=reset]").click()
    WebDriverWait(browser, 5).until(lambda one: len(ask(one, ROWS)) == len(found.collectives))


@pytest.mark.parametrize("column", range(7))
def test_every_column_sorts_both_ways(browser: webdriver.Chrome, column: int) -> None:
    tab(browser, "collectives")
    button = browser.find_elements(By.CSS_SELECTOR, "[data-listing] th button")[column]
    read = "return [...document.querySelectorAll('[data-listing] tbody tr')].map(r => r.cells[arguments[0]])"
    figures = button.get_attribute("data-sort") == "figure"
    value = ".map(c => Number(c.dataset.order))" if figures else ".map(c => c.textContent)"
    orders = []
    for _ in range(2):
        button.click()
        direction = ask(browser, "return arguments[0].closest('th').ariaSort", button)
        orders.append(direction)
        values = ask(browser, read + value, column)
        if figures:
            assert values == sorted(values, reverse=direction == "descending")
        else:
            compare = "(a, b) => a.localeCompare(b, 'en', {numeric: true})"
            in_order = ask(browser, f"return arguments[0].slice().sort({compare})", values)
            assert values == (in_order if direction == "ascending" else in_order[::-1])
    assert sorted(orders) == ["ascending", "descending"]
    assert orders[0] == ("descending" if figures else "ascending")


def test_a_mark_says_what_it_is(browser: webdriver.Chrome) -> None:
    mark = browser.find_element(
        By.CSS_SELECTOR, "#overview .wide [role=graphics-symbol][aria-label^='compute']"
    )
    webdriver.ActionChains(browser).move_to_element(mark).perform()
    tip = browser.find_element(By.ID, "tip")
    assert tip.is_displayed()
    assert tip.text == mark.get_attribute("aria-label")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("width", "height"), [(1280, 900), (390, 844), (320, 640)], ids=["desk", "phone", "small"]
)
def test_no_part_is_wider_than_the_window(
    browser: webdriver.Chrome, width: int, height: int, dark: bool
) -> None:
    look(browser, width, height, dark=dark)
    for name in TABS:
        ask(browser, f"document.getElementById('tab-{name}').click()")
        assert ask(browser, "return document.documentElement.scrollWidth") <= width
        visible = (
            "return [...document.querySelectorAll(`#${arguments[0]} .drawing`)].filter(d => d.offsetWidth)"
        )
        drawn = ask(browser, f"{visible}.map(d => [d.scrollWidth, d.clientWidth])", name)
        assert all(scroll <= client for scroll, client in drawn)


CONTRAST = """
const channel = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const lum = colour => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(v => channel(Number(v)));
  return .2126 * r + .7152 * g + .0722 * b;
};
const ratio = (a, b) => (Math.max(lum(a), lum(b)) + .05) / (Math.min(lum(a), lum(b)) + .05);
const probe = document.body.appendChild(document.createElement('i'));
const of = name => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
return arguments[0].map(([a, b]) => [a, b, ratio(of(a), of(b))]);
"""
TEXTS = ["ink", "muted", "accent", "good", "warn", "bad"]
SERIES = [f"series-{number}" for number in range(1, 9)]
BARS = ["compute", "exposed", "waiting", "forward", "backward", "optimizer", "other", *SERIES]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(browser: webdriver.Chrome, dark: bool) -> None:
    """WCAG 2.2: 4.5 to 1 for text on a page (1.4.3), 3 to 1 for marks of a drawing (1.4.11) and the words on
    them, which the page says again in a table or a caption."""
    look(browser, 1280, 900, dark=dark)
    pairs = [(text, ground) for text in TEXTS for ground in ("paper", "ground")]
    found = ask(browser, CONTRAST, pairs)
    assert [one for one in found if one[2] < 4.5] == []
    marks = ask(browser, CONTRAST, [*((bar, "paper") for bar in BARS), *((bar, "on-colour") for bar in BARS)])
    assert [one for one in marks if one[2] < 3] == []


def test_without_scripts_everything_is_there(browser: webdriver.Chrome, page: str) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(page)
        assert all(browser.find_element(By.ID, name).is_displayed() for name in TABS)
        assert not browser.find_element(By.CSS_SELECTOR, "[role=tablist]").is_displayed()
        assert not browser.find_element(By.CSS_SELECTOR, ".filters").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize("width", [1280, 390])
def test_comparisons_and_diffs_open_without_a_complaint(
    browser: webdriver.Chrome, tmp_path: Path, width: int
) -> None:
    whole = llama_70b().analysis
    other = replace(llama_70b(), case=llama_70b().case.on("h100+ethernet-100g:64x8"))
    assert whole is not None
    fewer = replace(whole, collectives=whole.collectives[3:])
    pages = (comparison_report(rank([llama_70b(), other])), diff_report(diff(whole, fewer)))
    look(browser, width, 800)
    for number, made in enumerate(pages):
        path = tmp_path / f"{number}.html"
        path.write_text(html_of(made), encoding="utf-8")
        assert path.stat().st_size < 3_000_000
        browser.get(path.as_uri())
        for one in made.tabs:
            ask(browser, f"document.getElementById('tab-{one.name}').click()")
            assert ask(browser, SHOWN) == [one.name]
            assert ask(browser, "return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("text", [*ATTACKS, SHOWN_CONTROL], ids=range(len(ATTACKS) + 1))
def test_names_are_inert(browser: webdriver.Chrome, tmp_path: Path, text: str) -> None:
    """Nothing runs, nothing is blocked (the console would tell), and the name can be filtered for."""
    path = tmp_path / "hostile.html"
    path.write_text(html_of(case_report(hostile(text))), encoding="utf-8")
    browser.get(path.as_uri())
    for button in browser.find_elements(By.CSS_SELECTOR, "[role=tab]"):
        button.click()
    tab(browser, "collectives")
    for element in browser.find_elements(By.CSS_SELECTOR, "[data-filter]"):
        Select(element).select_by_index(1)
    assert len(ask(browser, ROWS)) == 1
    assert ask(browser, "return [typeof window.pwned, document.scripts.length, document.images.length]") == [
        "undefined",
        1,
        0,
    ]
