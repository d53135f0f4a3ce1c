"""The page of a look, driven in a browser: it shows what the look holds, and text of the data stays text."""

import json
import re
import shutil

import pytest
from test_look import LOOK

from finetune.data import page
from finetune.data.look import Look, Shown, Span

HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">\u2028 & <b>bold</b>"
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def hostile_look() -> Look:
    shown = [Shown(1, "the first", 3, 1, [Span(HOSTILE, False, 2), Span("learned " + HOSTILE, True, 1)]), *LOOK.shown]
    return Look(HOSTILE, [("samples", HOSTILE), *LOOK.rows], LOOK.bars, 512, shown, [HOSTILE], [HOSTILE])


def test_the_page_is_whole_and_needs_nothing_else():
    text = page.html_of(hostile_look())
    assert page.PLACE not in text and not re.search(r"https?://|src=[^x]|@import|<link", text.replace(HOSTILE, ""))
    inside = text.split('id="look">', 1)[1].split("</script>", 1)[0]
    assert json.loads(inside)["shown"][0]["spans"][0][0] == HOSTILE


@pytest.fixture(scope="module")
def browser():
    if not (BROWSER and DRIVER):
        pytest.skip("no chromium with chromedriver here")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", "window-size=1000,900"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_in_a_browser(browser, tmp_path):
    path = tmp_path / "look.html"
    path.write_text(page.html_of(hostile_look()), encoding="utf-8")
    browser.get(path.as_uri())

    def find(selector):
        return browser.find_elements("css selector", selector)

    def texts(selector):
        return [element.get_attribute("textContent") for element in find(selector)]

    assert texts("#title") == [HOSTILE] == texts("#notes li") == texts("#findings li") and "taken" != browser.title
    assert texts("#rows th") == ["samples", "samples", "memory"] and texts("#rows td")[0] == HOSTILE
    assert texts("#bars .range") == ["1 – 10", "11 – 20", "21 – 1,000"] and texts("#bars .bar span") == ["1", "0", "80"]
    widths = [element.size["width"] for element in find("#bars i")]
    assert len(widths) == 2 and 0 < widths[0] < widths[1] / 40
    # from sample to sample, with buttons and keys
    assert texts("#which") == ["Sample 1 (the first): 3 tokens, 1 of them learned"] and texts("#sample .learned") == ["learned " + HOSTILE]
    before, after = find("#before")[0], find("#after")[0]
    assert not before.is_enabled() and after.is_enabled()
    after.click()
    assert "9 tokens" in texts("#which")[0] and texts("#sample .learned") == ["yo\n\nyes<|im_end|>"] and before.is_enabled()
    find("body")[0].send_keys("\ue014")  # the right arrow
    assert "Sample 7: 900 tokens" in texts("#which")[0] and not after.is_enabled()
    before.click()
    # context can be left out
    shown = find("#sample .context")[0]
    assert shown.is_displayed()
    find("#only")[0].click()
    assert not shown.is_displayed() and find("#sample .learned")[0].is_displayed()
    assert find("#sample .learned")[0].value_of_css_property("background-color") != find("#sample")[0].value_of_css_property("background-color")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    # nothing sticks out of a narrow window
    browser.set_window_size(400, 900)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
