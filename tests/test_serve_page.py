"""The page at `/` in a real browser, against a real server."""

from __future__ import annotations

import pytest
from browser import browser, console, look, require_browser
from conftest import enliven, make_tiny
from served import picture, serving, until
from test_report_browser import CONTRAST, CUT_OFF, INTERACTIVE, one, press

pytestmark = pytest.mark.slow
QUESTION = "Which robots are suited?"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def address(tiny_settings, tokenizer):
    require_browser()
    with serving(enliven(make_tiny(tiny_settings, tokenizer)), max_pixels=10_000) as client:
        yield str(client.base_url)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "small.png").write_bytes(picture())
    (folder / "large.png").write_bytes(picture(size=(200, 200)))
    (folder / "notes.txt").write_text("no picture")
    return folder


def answered(driver) -> bool:
    return one(driver, "#ask").is_enabled() and (
        one(driver, "#answer-box").is_displayed() or one(driver, "#error").text
    )


def ask(driver, question: str = QUESTION) -> None:
    one(driver, "#question").clear()
    one(driver, "#question").send_keys(question)
    one(driver, "#ask").click()
    until(lambda: answered(driver))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_is_legible_and_shows_what_the_port_says(driver, address, files, width, dark):
    look(driver, address, width=width, dark=dark)
    one(driver, "#picture").send_keys(str(files / "small.png"))
    until(lambda: one(driver, "#preview").is_displayed())
    ask(driver)
    assert one(driver, "#asked").text == QUESTION and one(driver, "#answer").text
    told = driver.execute_async_script(
        """const done = arguments[1];
        const url = document.getElementById('preview').src;
        const content = [{type: 'text', text: arguments[0]}, {type: 'image_url', image_url: {url}}];
        const body = JSON.stringify({model: 'embervlm', messages: [{role: 'user', content}]});
        fetch('/v1/chat/completions', {method: 'POST', body, headers: {'Content-Type': 'application/json'}})
          .then((reply) => reply.json()).then((found) => done(found.choices[0]));""",
        QUESTION,
    )
    assert one(driver, "#answer").text == (told["message"]["content"] or told["message"]["refusal"]).strip()
    steps = [node.text for node in driver.find_elements("css selector", "#steps li")]
    text = told["message"]["reasoning_content"]
    assert len(steps) == text.count("Step ") and all(step.split("\n")[0] in text for step in steps)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert driver.execute_script(CUT_OFF) == []
    assert driver.execute_script(CONTRAST) == []
    asked = driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in asked if not name.startswith((address, "data:"))] == []
    assert console(driver) == []


def test_it_is_used_by_keyboard_and_every_field_has_a_name(driver, address):
    from selenium.webdriver.common.keys import Keys

    look(driver, address)
    reached = []
    for _ in range(3):
        press(driver, Keys.TAB)
        name, outline = driver.execute_script(
            "const a = document.activeElement; return [a.id, parseFloat(getComputedStyle(a).outlineWidth)]"
        )
        reached.append(name)
        assert outline >= 2, "the focus is visible"
    assert reached == ["picture", "question", "ask"]
    driver.execute_script("document.getElementById('question').focus()")
    press(driver, QUESTION, Keys.ENTER)
    until(lambda: answered(driver))
    assert one(driver, "#asked").text == QUESTION
    for field in driver.find_elements("css selector", f"{INTERACTIVE}, textarea"):
        if field.is_displayed():
            assert field.accessible_name, field.get_attribute("outerHTML")[:200]
    assert driver.execute_script("return document.documentElement.lang") == "en"


def test_each_step_shows_where_the_model_looked_by_mouse_and_by_keyboard(driver, address, files):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    look(driver, address)
    ask(driver)
    assert not one(driver, "#looked").is_displayed(), "there is no picture"
    one(driver, "#picture").send_keys(str(files / "small.png"))
    until(lambda: one(driver, "#preview").is_displayed())
    ask(driver)
    steps = driver.find_elements("css selector", "button.step")
    pixels = "const veil = document.getElementById('veil'); return veil.hidden ? null : veil.toDataURL()"
    assert len(steps) > 1 and steps[0].get_attribute("aria-pressed") == "true"
    assert one(driver, "#looked-at").text.startswith("Step 1: clear where the model looked")
    first, second = driver.execute_script(pixels), ("Step 2: clear", "Conclusion: clear")
    ActionChains(driver, duration=0).move_to_element(steps[1]).perform()
    assert one(driver, "#looked-at").text.startswith(second) and driver.execute_script(pixels) != first
    ActionChains(driver, duration=0).move_to_element(one(driver, "#asked")).perform()
    assert driver.execute_script(pixels) == first, "the chosen one is shown again"
    driver.execute_script("arguments[0].focus()", steps[0])
    press(driver, Keys.TAB)
    assert one(driver, "#looked-at").text.startswith(second)
    press(driver, Keys.SPACE)
    assert [step.get_attribute("aria-pressed") for step in steps[:2]] == ["false", "true"]
    press(driver, Keys.SPACE)
    driver.execute_script("document.activeElement.blur()")
    assert driver.execute_script(pixels) is None and "Choose a step" in one(driver, "#looked-at").text
    grid = driver.execute_script(
        "return [document.getElementById('veil').width, document.getElementById('veil').height]"
    )
    assert min(grid) > 1
    assert "need not be the reason" in one(driver, "#about-looks").text
    assert driver.execute_script(CUT_OFF) == [] and console(driver) == []


def test_a_follow_up_sends_the_conversation_and_another_picture_ends_it(driver, address, files):
    look(driver, address)
    driver.execute_script(
        """window.sent = []; const plain = window.fetch;
        window.fetch = (url, options) => { window.sent.push(JSON.parse(options.body)); return plain(url, options); };"""
    )
    ask(driver)
    one(driver, "#follow").click()
    ask(driver, "What if it rains?")
    first, second = driver.execute_script("return window.sent")
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][0] == first["messages"][0] and "reasoning_content" in second["messages"][1]
    one(driver, "#picture").send_keys(str(files / "small.png"))
    until(lambda: not one(driver, "#follow").is_displayed())
    ask(driver)
    assert len(driver.execute_script("return window.sent[2].messages")) == 1
    assert console(driver) == []


def test_what_goes_wrong_is_said_and_text_is_never_markup(driver, address, files):
    look(driver, address, width=390)
    one(driver, "#ask").click()
    assert not one(driver, "#asked").is_displayed(), "an empty question is not sent"
    one(driver, "#picture").send_keys(str(files / "notes.txt"))
    until(lambda: "notes.txt is not a picture" in one(driver, "#error").text)
    one(driver, "#picture").send_keys(str(files / "large.png"))
    until(lambda: one(driver, "#preview").is_displayed())
    ask(driver, "<img src=x onerror=window.hit=1>")
    assert "too many pixels" in one(driver, "#error").text
    one(driver, "#remove").click()
    assert not one(driver, "#preview").is_displayed()
    ask(driver, "<img src=x onerror=window.hit=1>")
    assert one(driver, "#asked").text == "<img src=x onerror=window.hit=1>"
    assert driver.execute_script("return window.hit") is None and one(driver, "#error").text == ""


def test_a_key_is_asked_for_where_the_server_wants_one(driver, tiny_settings, tokenizer):
    with serving(make_tiny(tiny_settings, tokenizer), key="open sesame") as client:
        look(driver, str(client.base_url))
        ask(driver)
        assert "send Authorization" in one(driver, "#error").text
        assert driver.execute_script("return document.activeElement.id") == "key"
        one(driver, "#key").send_keys("open sesame")
        ask(driver)
        assert one(driver, "#error").text == "" and one(driver, "#answer").text
