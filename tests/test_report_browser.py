"""The pages of a report in a real browser: keyboard, filters, narrow and dark, and hostile text that must not run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import browser, console, look, require_browser
from report_run import write_run
from test_report import hostile_run

from embervlm.curate.findings import CheckOptions
from embervlm.curate.validate import validate
from embervlm.report.build import write_report
from embervlm.report.validation import report_page

pytestmark = pytest.mark.slow
INTERACTIVE = "a[href], button:not(:disabled), select, input:not(:disabled), summary"
CONTRAST = """
const rgb = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const luminance = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (node) => { for (; node; node = node.parentElement) {
  const color = rgb(getComputedStyle(node).backgroundColor); if (color.length < 4 || color[3] === 1) return color; }
  return [255, 255, 255]; };
const low = [];
for (const node of document.querySelectorAll('body *:not(svg *)')) {
  const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  if (!own || node.matches('script, :disabled, .hidden-text, .skip') || !node.getClientRects().length) continue;
  const [a, b] = [luminance(rgb(getComputedStyle(node).color)), luminance(behind(node))].sort((x, y) => y - x);
  if ((a + 0.05) / (b + 0.05) < 4.5)
    low.push(`${node.tagName}.${node.className}: ${((a + 0.05) / (b + 0.05)).toFixed(2)}`);
}
return low;
"""

CUT_OFF = """
const found = [];
const seen = (node) => node.checkVisibility() && !node.closest('.hidden-text, .skip, thead, nav');
for (const node of [...document.querySelectorAll('body *:not(svg *)')].filter(seen)) {
  const { display } = getComputedStyle(node);
  if (display !== 'inline' && node.scrollWidth > node.clientWidth + 1)
    found.push(`${node.tagName}.${node.className} is ${node.scrollWidth} wide, shows ${node.clientWidth}`);
}
for (const text of [...document.querySelectorAll('svg text')].filter(seen)) {
  const own = text.getBoundingClientRect(), all = text.ownerSVGElement.getBoundingClientRect();
  const size = parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a;
  if (own.left < all.left - 2 || own.right > all.right + 2 || own.top < all.top - 2 || own.bottom > all.bottom + 2)
    found.push(`"${text.textContent}" sticks out of its figure`);
  if (size < 9.5) found.push(`"${text.textContent}" has ${size.toFixed(1)} pixels`);
}
return found;
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_browser()
    return write_report(write_run(tmp_path_factory.mktemp("pages") / "run", num_samples=12)).index.parent


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def all_of(driver: Any, selector: str) -> list[Any]:
    return driver.find_elements("css selector", selector)


def one(driver: Any, selector: str) -> Any:
    return driver.find_element("css selector", selector)


def choose(driver: Any, selector: str, text: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(one(driver, selector)).select_by_visible_text(text)


def press(driver: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    for key in keys:
        ActionChains(driver, duration=0).send_keys(key).perform()


def count(driver: Any) -> str:
    return str(one(driver, "#f-count").text)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", ["index.html", "samples/best_reasoning_examples.html", "samples/failure_cases.html"])
def test_a_page_fits_its_width_is_legible_and_says_nothing_to_the_console(
    driver: Any, pages: Path, page: str, width: int, dark: bool
) -> None:
    look(driver, pages / page, width=width, dark=dark)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == (
        "rgb(18, 22, 29)" if dark else "rgb(246, 247, 249)"
    )
    assert driver.execute_script(CONTRAST) == []
    driver.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert driver.execute_script(CUT_OFF) == []
    broken = "return [...document.images].filter((image) => !image.complete || !image.naturalWidth).length"
    assert driver.execute_script(broken) == 0
    assert console(driver) == []


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_a_data_check_shows_everything_at_its_width(driver: Any, tmp_path: Path, width: int) -> None:
    long = "which_is_" + "a_long_name_" * 20
    record = {"instruction": f"Add it up: {long}", "reasoning": "Step 1: 2 + 2 = 4.\nConclusion: 4.", "answer": "4"}
    records = [record, record, {**record, "answer": long}, {**record, "image": f"gone/{long}.png"}, {"reasoning": long}]
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    page = tmp_path / "page.html"
    page.write_text(report_page(validate(tmp_path / "data.json", CheckOptions())), encoding="utf-8")
    look(driver, page, width=width)
    assert len(all_of(driver, ".example")) >= 3
    lefts = {round(card.rect["x"]) for card in all_of(driver, ".charts .card")}
    assert len(lefts) == (2 if width > 1000 else 1), "charts stand side by side where there is room"
    assert driver.execute_script(CUT_OFF) == []
    assert driver.execute_script(CONTRAST) == []
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width


def test_nothing_is_asked_of_the_network(driver: Any, pages: Path) -> None:
    look(driver, pages / "index.html")
    asked = driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in asked if not name.startswith("data:")] == []


def test_each_filter_shows_what_fits_and_they_combine(driver: Any, pages: Path) -> None:
    look(driver, pages / "index.html")
    data = driver.execute_script("return JSON.parse(document.getElementById('data').textContent).samples")
    assert count(driver) == f"{len(data)} of {len(data)} samples"
    wrong = [item for item in data if not item["correct"]]
    choose(driver, "#f-correct", "wrong")
    assert count(driver) == f"{len(wrong)} of {len(data)} samples" and 0 < len(wrong) < len(data)
    assert len(all_of(driver, "#list .mark.wrong")) == len(all_of(driver, "#list button")) == len(wrong)
    assert one(driver, "#detail .question").text == wrong[0]["instruction"]
    choose(driver, "#f-correct", "right or wrong")
    choose(driver, "#f-answer", "Humanoid")
    found = [item for item in data if "Humanoid" in item["answers"]]
    assert count(driver).startswith(f"{len(found)} of") and 0 < len(found) < len(data)
    choose(driver, "#f-complexity", "simple")
    found = [item for item in found if item["complexity"] == "simple"]
    assert count(driver).startswith(f"{len(found)} of")
    one(driver, "#f-text").send_keys("no such words")
    assert count(driver).startswith("0 of") and "No sample fits" in one(driver, "#detail").text
    assert console(driver) == []


def test_a_step_shows_its_own_attention_and_it_can_be_switched_off(driver: Any, pages: Path) -> None:
    look(driver, pages / "index.html")
    steps = all_of(driver, "#detail button.step")
    first = one(driver, ".frame .veil").get_attribute("src")
    steps[2].click()
    assert steps[2].get_attribute("aria-pressed") == "true" and steps[0].get_attribute("aria-pressed") == "false"
    assert one(driver, ".frame .veil").get_attribute("src") != first
    assert one(driver, ".under").text.startswith("Step 3:")
    assert [item.text.split("\n")[0] for item in all_of(driver, ".things li")] == ["flag", "sky"]
    assert "% on " in steps[2].text, "each attention map has its share beside it"
    one(driver, "#attention").click()
    assert not all_of(driver, ".frame .veil, .things li") and one(driver, ".under").text == "Attention is hidden."
    all_of(driver, "#list button")[1].click()
    assert not all_of(driver, ".frame .veil"), "it stays off on the next sample"
    one(driver, "#attention").click()
    assert all_of(driver, ".frame .veil")


def test_two_checkpoints_stand_side_by_side_with_what_differs_marked(driver: Any, pages: Path) -> None:
    look(driver, pages / "index.html")
    assert [card.text.split("\n")[0] for card in all_of(driver, "#c-pair article")] == ["Epoch 1", "Epoch 3"]
    left, right = (len(card.find_elements("css selector", ".step")) for card in all_of(driver, "#c-pair article"))
    assert left == 3 and right > left
    assert len(all_of(driver, "#c-pair .differs")) == right - left
    choose(driver, "#c-left", "Epoch 3")
    assert one(driver, "#c-right").get_property("value") == "1", "it is not compared with itself"
    assert console(driver) == []


def test_the_keyboard_reaches_everything_and_shows_where_it_is(driver: Any, pages: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    look(driver, pages / "index.html")
    script = f"""
      const shown = [...document.querySelectorAll({INTERACTIVE!r})].filter((node) => node.checkVisibility());
      shown.forEach((node, place) => node.dataset.place = place);
      return shown.length;"""
    num = driver.execute_script(script)
    reached: list[str] = []
    for _ in range(num + 40):  # scrolling regions take a stop of their own
        press(driver, Keys.TAB)
        place, width = driver.execute_script(
            "const a = document.activeElement; return [a.dataset.place, parseFloat(getComputedStyle(a).outlineWidth)]"
        )
        if place is not None:
            assert width >= 2, "the focus is visible"
            if place in reached:
                break
            reached.append(place)
    assert reached == [str(place) for place in range(num)], "each once, in the order of the page"


def test_a_sample_is_opened_and_its_steps_walked_by_keyboard(driver: Any, pages: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    look(driver, pages / "index.html")
    driver.execute_script("document.querySelectorAll('#list button')[3].focus()")
    press(driver, Keys.ENTER)
    data = driver.execute_script("return JSON.parse(document.getElementById('data').textContent).samples")
    assert one(driver, "#detail .question").text == data[3]["instruction"]
    driver.execute_script("document.querySelector('#next').focus()")
    press(driver, Keys.ENTER)
    assert one(driver, "#detail .question").text == data[4]["instruction"]
    assert driver.execute_script("return document.activeElement.id") == "next", "the focus is not lost"
    press(driver, Keys.TAB, Keys.TAB, Keys.TAB, Keys.SPACE)
    assert one(driver, "#detail button.step[aria-pressed=true] .no").text == "2"


def test_every_field_has_a_name_and_the_headings_are_in_order(driver: Any, pages: Path) -> None:
    look(driver, pages / "index.html")
    for field in all_of(driver, "select, input, button, a"):
        assert field.accessible_name, field.get_attribute("outerHTML")[:200]
    levels = driver.execute_script("return [...document.querySelectorAll('h1, h2, h3, h4')].map((h) => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert driver.execute_script("return document.documentElement.lang") == "en"


def test_hostile_text_does_not_run(driver: Any, tmp_path: Path) -> None:
    out = write_report(hostile_run(tmp_path / "<img src=x onerror=window.hit=1>")).index.parent
    for page in ("index.html", "samples/best_reasoning_examples.html", "samples/failure_cases.html"):
        for width in (1280, 390):
            look(driver, out / page, width=width)
            driver.execute_script("document.querySelectorAll('#list button, button.step').forEach((b) => b.click())")
            assert driver.execute_script("return window.hit") is None
            assert (
                driver.execute_script("return document.querySelectorAll('main script, main svg[onload]').length") == 0
            )
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            assert console(driver) == []
    assert "<script>window.hit=1</script>" in one(driver, "main").text
