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
from synthetic import CONTROLS, GREYS, SCALES, TARGETS, results, write

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


ORDER = """() => {
  const all = (what) => [...document.querySelectorAll(what)], wrong = [], ids = all('[id]').map((e) => e.id);
  const check = (holds, what, e) => holds || wrong.push(what + ': ' + (e ? e.outerHTML.slice(0, 90) : ''));
  check(document.documentElement.lang, 'no language');
  ['h1', 'main', 'header', 'nav[aria-label]'].forEach((what) => check(all(what).length === 1, 'landmarks', all(what)[1]));
  check(new Set(ids).size === ids.length, 'an id twice');
  all('img').forEach((e) => check(e.alt, 'no alt', e));
  all('svg').forEach((e) => check(e.getAttribute('aria-hidden') || e.getAttribute('aria-label'), 'a chart without words', e));
  all('svg text').filter((e) => e.checkVisibility()).forEach((e) => {
    const box = e.getBBox(), frame = e.ownerSVGElement.viewBox.baseVal;
    const [right, foot] = [box.x + box.width, box.y + box.height];
    check(box.x >= 0 && box.y >= 0 && right <= frame.width && foot <= frame.height, 'text outside of its chart', e);
  });
  all('input, select').forEach((e) => check([...e.labels].some((l) => l.innerText.trim()), 'no label', e));
  all('input[type=range]').forEach((e) => check(e.getAttribute('aria-valuetext'), 'no value in words', e));
  all('th').forEach((e) => check(e.scope && e.textContent.trim(), 'no scope', e));
  all('a[href]').forEach((e) => check(ids.includes(e.getAttribute('href').slice(1)), 'a link to nowhere', e));
  all('[aria-labelledby]').forEach((e) => check(ids.includes(e.getAttribute('aria-labelledby')), 'no name', e));
  all('.wide, pre').forEach((e) => check(e.tabIndex === 0, 'scrolls by mouse only', e));
  all('h1, h2, h3, h4').reduce((last, e) => (check(+e.tagName[1] <= last + 1, 'a level left out', e), +e.tagName[1]), 0);
  return wrong;
}"""

CONTRAST = """() => {
  const parse = (c) => { const [r, g, b, a = 1] = c.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = ([r, g, b, a], under) => [r, g, b].map((v, i) => v * a + under[i] * (1 - a));
  const under = (e) => {
    const layer = parse(getComputedStyle(e).backgroundColor);
    return layer[3] === 1 ? layer.slice(0, 3) : over(layer, e.parentElement ? under(e.parentElement) : [255, 255, 255]);
  };
  const light = (c) => c.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const style = getComputedStyle(e), text = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!text || !e.checkVisibility({ visibilityProperty: true }) || e.matches('script')) continue;
    const back = under(e), front = over(parse(e instanceof SVGElement ? style.fill : style.color), back);
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 90)]);
  }
  return found;
}"""


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
