"""The playground in a real browser: a slider moves, the steered answer changes, the unsteered one does not."""

from __future__ import annotations

import functools
import json
import os
import threading
import time

import browsers
import pytest

from faststeer import demo, evaluate
from faststeer.intervention import Add
from faststeer.plan import Plan

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'faststeer[ui]'")
pytestmark = pytest.mark.skipif(bool(browsers.MISSING), reason=browsers.MISSING)


@pytest.fixture(scope="module")
def address(playground):
    """Served from a thread; where."""
    from faststeer.ui import server as serving

    with serving.bind("127.0.0.1", 0) as bound:
        server = serving.server(playground, max_new_tokens=48)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        yield serving.url(bound)
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser(address, tmp_path_factory):
    with browsers.opened(address, tmp_path_factory.mktemp("profile"), height=1430) as driver:
        driver.set_script_timeout(180)  # gradio's copy of Plotly takes a busy machine a while to begin
        yield driver


def box(browser, name):
    return browser.execute_script("return document.querySelector(`#${arguments[0]} textarea`)?.value", name)


def wait(browser, condition):
    return browsers.wait(browser, condition, 180)


def answers(browser, *expected):
    """Wait for (unsteered, steered), and see that they stay."""
    wait(browser, lambda: (box(browser, "unsteered"), box(browser, "steered")) == expected)
    time.sleep(0.5)
    assert (box(browser, "unsteered"), box(browser, "steered")) == expected


def strength(browser, number, value):
    """Type a strength beside its slider, and see that the slider moves."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    field = browser.find_element(By.CSS_SELECTOR, f"#strength-{number} input[type=number]")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(str(value), Keys.TAB)
    slider = f"return +document.querySelector('#strength-{number} input[type=range]').value"
    wait(browser, lambda: browser.execute_script(slider) == value)


@functools.cache
def reference():
    return demo.load()


def expected(prompt, *interventions):
    """By `generate` of another model with these weights, since the page's own is at work in a thread."""
    plan = Plan(interventions) if interventions else None
    return evaluate.complete(*reference(), [prompt], plan, max_new_tokens=48)[0]


def heat(browser):
    """`[(unsteered, steered)]` of the heat map: each a list of layers by tokens."""
    return browser.execute_script(
        "return [...document.querySelectorAll('#heat .js-plotly-plot')].at(-1)?.data?.map((t) => t.z)"
    )


def test_a_slider_changes_the_steered_answer_alone(browser, playground):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    prompt, refusal = playground.examples[0], playground.vectors["refusal"]
    unsteered = expected(prompt)
    refused = expected(prompt, Add(refusal, 1.0, layers=4))
    assert evaluate.is_refusal(refused) and not evaluate.is_refusal(unsteered)
    answers(browser, unsteered, refused)
    wait(browser, lambda: heat(browser))
    if folder := os.environ.get("FASTSTEER_SCREENSHOTS"):
        time.sleep(1)
        browser.save_screenshot(f"{folder}/playground.png")
    before = heat(browser)

    slider = browser.find_element(By.CSS_SELECTOR, "#strength-0 input[type=range]")
    slider.send_keys(Keys.HOME)  # to -2
    answers(browser, unsteered, expected(prompt, Add(refusal, -2.0, layers=4)))
    strength(browser, 0, 0)
    answers(browser, unsteered, unsteered)
    wait(browser, lambda: heat(browser)[1] == heat(browser)[0])
    assert heat(browser)[0] == before[0] != before[1]  # the unsteered map has stayed to the last bit


def test_two_vectors_another_prompt_and_no_stray_request(browser, playground, address):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    question = demo.neutral_questions("test")[0]
    field = browser.find_element(By.CSS_SELECTOR, "#prompt textarea")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(question, Keys.ENTER)
    strength(browser, 1, 1)
    tone, refusal = playground.vectors["tone"], playground.vectors["refusal"]
    unsteered = expected(question)
    cheerful = expected(question, Add(tone, 1.0, layers=1))
    assert demo.tone(cheerful) == "cheerful"
    answers(browser, unsteered, cheerful)
    strength(browser, 0, -0.5)
    both = expected(question, Add(refusal, -0.5, layers=4), Add(tone, 1.0, layers=1))
    answers(browser, unsteered, both)
    browser.find_element(By.ID, "reset").click()
    answers(browser, unsteered, unsteered)

    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # The browser's own first page asks for its parts; what counts is what this page asks for.
    asked = [request["request"]["url"] for request in requests if request["documentURL"].startswith(address)]
    assert len(asked) > 10 and not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
