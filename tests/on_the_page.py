"""What a person does on the report's page and reads off it."""

from __future__ import annotations

import sqlite3
import time


def sql(path, query, *values):
    with sqlite3.connect(path) as db:
        return db.execute(query, values).fetchall()


def text(browser, id):
    return browser.execute_script("return document.getElementById(arguments[0]).textContent", id)


def choose(browser, id, value):
    """Choose an option by value, as a person would; it must be there."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element(By.ID, id)).select_by_value(value)


def write(browser, id, value):
    """Type into a field, and wait for what it does."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    field = browser.find_element(By.ID, id)
    field.send_keys(Keys.CONTROL, "a", Keys.DELETE)
    field.send_keys(value, Keys.TAB)
    time.sleep(0.3)  # it waits 0.15 s for the next key


def rows(browser):
    """The settings' table: {setting: [cells]}, of all its pages."""
    found = {}
    while True:
        found |= browser.execute_script(
            "return Object.fromEntries([...document.querySelectorAll('#settings tbody tr')]"
            ".map((r) => [r.dataset.setting, [...r.cells].map((c) => c.textContent)]))"
        )
        following = "return [...document.querySelectorAll('#settings-pager button')].at(-1)"
        if not browser.execute_script(f"{following}?.disabled === false"):
            return {int(number): cells for number, cells in found.items()}
        browser.execute_script(f"{following}.click()".removeprefix("return "))


def cards(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('#answers article')].map((a) => [+a.dataset.setting, +a.dataset.prompt,"
        " ...[...a.querySelectorAll(':scope > .sides > .side')].map((s) => [s.querySelector('.text')?.textContent,"
        " s.querySelector('li:nth-child(2)')?.textContent])])"
    )


def count(browser):
    return int(browser.execute_script("return document.getElementById('answers-count').dataset.count"))


MAPS = """
return [...document.querySelectorAll('#answers article')].map((card) => [
  +card.dataset.setting,
  +card.dataset.prompt,
  [...card.querySelectorAll('.projections .js-plotly-plot')].map((plot) => ({
    z: plot.data[0].z,
    tokens: plot.data[0].customdata[0],
    range: [plot.data[0].zmin, plot.data[0].zmax],
    end: plot.layout.shapes[0].x0,
  })),
]).filter((card) => card[2].length)
"""


def maps(browser):
    """`{(setting, prompt): (unsteered, steered)}` of the projections that are open."""
    return {(setting, prompt): tuple(found) for setting, prompt, found in browser.execute_script(MAPS)}


def toggle(browser, setting, prompt):
    """Click the button of a card's projections, and return what it says."""
    from selenium.webdriver.common.by import By

    card = f"article[data-setting='{setting}'][data-prompt='{prompt}']"
    button = browser.find_element(By.CSS_SELECTOR, f"{card} .projections > button")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    return button.text
