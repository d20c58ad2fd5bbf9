"""The report driven in a real headless Chromium: its dials, its choices, what it asks for, and whether
everybody can read it.
"""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright
from support.synthetic import CONTROLS, GREYS, SCALES, TARGETS, results, write

from analysis import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    return report.build(write(results(), tmp_path_factory.mktemp("run"))).as_uri()


@pytest.fixture
def opened(browser: Browser, address: str):
    """Opens the page, with what a context of the browser takes; in the end no error was logged and nothing
    asked of a network.
    """
    contexts, wrong = [], []

    def open_page(**options) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on(
            "request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url)
        )
        page.on(
            "console", lambda message: message.type in ("error", "warning") and wrong.append(message.text)
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def greys(view: Locator) -> np.ndarray:
    """What is seen of a sheet, from left to right along its middle."""
    image = np.asarray(Image.open(io.BytesIO(view.screenshot())).convert("L"), dtype=int)
    return image[len(image) // 2, 3:-3]


def shown(section: Locator) -> list[int]:
    """The column of its sheet that each member of a control shows, and nothing else of it."""
    views = [greys(view) for view in section.locator(".view").all()]
    assert len(views) == len(TARGETS) and all(np.ptp(seen) <= 2 for seen in views)
    return [int(np.abs(np.array(GREYS) - np.median(seen)).argmin()) for seen in views]


def whole(view: Locator) -> bool:
    """Whether all columns of a sheet are seen."""
    seen = greys(view)
    return all(np.abs(seen - grey).min() <= 2 for grey in GREYS)


def test_the_mouse_drags_all_members_of_a_control_through_the_scales(opened):
    page = opened()
    first, second = (page.locator(f"section[aria-labelledby=control-{i}]") for i in (1, 2))
    dial = first.get_by_role("slider")
    assert shown(first) == [SCALES.index(1)] * len(TARGETS)
    box = dial.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.8, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.3, y, steps=4)
    page.mouse.move(box["x"] + 2, y, steps=4)
    page.mouse.up()
    assert shown(first) == [0] * len(TARGETS) and dial.get_attribute("aria-valuetext") == "scale −2"
    assert first.locator(".says").inner_text() == "scale −2"
    assert shown(second) == [SCALES.index(1)] * len(TARGETS)


def test_the_keyboard_turns_every_control_by_the_dial_on_top(opened):
    page = opened()
    top = page.get_by_role("slider", name="All controls:")
    top.focus()
    page.keyboard.press("ArrowLeft")
    assert top.get_attribute("aria-valuetext") == "scale +0.5"
    assert [dial.get_attribute("aria-valuetext") for dial in page.get_by_role("slider").all()] == [
        "scale +0.5"
    ] * (1 + len(CONTROLS))
    assert shown(page.locator("section[aria-labelledby=control-2]")) == [3] * len(TARGETS)
    page.keyboard.press("End")
    assert shown(page.locator("section[aria-labelledby=control-3]")) == [5] * len(TARGETS)


def test_a_dial_without_the_scale_of_the_one_on_top_goes_to_the_nearest(opened):
    page = opened()
    page.locator("#control-1 ~ * input[type=range]").evaluate(
        "d => d.dataset.values = '[0, 0.2, 0.4, 0.6, 0.8, 1]'"
    )
    top = page.get_by_role("slider", name="All controls:")
    for key, column in (("Home", 0), ("End", 5), ("ArrowLeft", 5), ("ArrowLeft", 2)):
        top.press(key)
        assert page.locator("#control-1 ~ * input[type=range]").input_value() == str(column)


def test_whole_sheets_on_request_on_paper_and_without_script(opened):
    page = opened()
    first = page.locator("section[aria-labelledby=control-1]")
    first.get_by_label("show all scales").check()
    assert all(whole(view) for view in first.locator(".view").all())
    assert not whole(page.locator(".view").last)
    page.emulate_media(media="print")
    assert whole(page.locator(".view").last) and not page.locator(".dial").first.is_visible()
    plain = opened(java_script_enabled=False)
    assert whole(plain.locator(".view").last) and not plain.locator(".dial, .choose").first.is_visible()
    assert all(part.is_visible() for part in plain.locator("[data-part]").all())


def test_a_choice_shows_one_leakage_matrix(opened):
    page = opened()

    def seen():
        return page.locator("[data-part]:visible caption").all_inner_texts()

    assert seen() == ["on base, by clip"]
    page.get_by_label("on", exact=True).select_option("tiny/dmd")
    page.get_by_label("by", exact=True).select_option("probe")
    assert seen() == ["on dmd, by probe"]


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_itself_never_scrolls_sideways(opened, width):
    page = opened(viewport={"width": width, "height": 844})
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_label("show all scales").last.check()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


ORDER, CONTRAST = (Path(__file__).with_name(name).read_text() for name in ("order.js", "contrast.js"))


def test_everything_has_its_name_and_place(opened):
    assert opened().evaluate(ORDER) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_all_text(opened, scheme):
    page = opened(color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    found = page.evaluate(CONTRAST)
    assert len(found) > 300 and not [(round(ratio, 2), what) for ratio, what in found if ratio < 4.5]


def test_focus_is_seen_and_the_keyboard_reaches_every_dial(opened):
    page = opened()
    names = []
    for _ in range(60):
        page.keyboard.press("Tab")
        kind, outline = page.evaluate(
            "(e => [e.type || e.tagName, getComputedStyle(e).outlineStyle])(document.activeElement)"
        )
        if kind == "BODY":
            break
        names.append(kind)
        assert outline != "none", kind
    assert names[0] == "A" and names.count("range") == 1 + len(CONTROLS)


def test_the_checks_themselves_see_what_is_wrong(browser, tmp_path: Path):
    (tmp_path / "bad.html").write_text(
        "<html><body><p style='color: #999'>pale</p><img src='data:,'><h3>low</h3><input></body></html>"
    )
    page = browser.new_page()
    page.goto((tmp_path / "bad.html").as_uri())
    assert {line.split(":")[0] for line in page.evaluate(ORDER)} >= {
        "no language",
        "landmarks",
        "no alt",
        "no label",
        "a level left out",
    }
    assert min(ratio for ratio, _ in page.evaluate(CONTRAST)) < 3
    page.close()
