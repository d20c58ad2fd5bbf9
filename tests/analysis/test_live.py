"""The live page: what it draws, and the page itself in a real headless Chromium."""

import importlib.util
import os
import shutil
import socket
from pathlib import Path
from threading import Thread
from urllib.request import proxy_bypass

import numpy as np
import pytest
import torch
from playwright.sync_api import Locator, Page, sync_playwright
from support.commands import configured, ran, refused
from support.commands import launched as command
from support.short_runs import QUICK

from analysis import live
from analysis.images import sheets
from analysis.live import page
from analysis.live.page import encoded
from analysis.live.studio import SEEDS, Studio, Wish, between
from analysis.measures.image_sets import diversity
from configs import ROOT, UserError, load
from controls import formats
from controls.picture_grid import to_image, to_uint8
from models.evaluators import load_evaluators
from models.families import Family
from models.plans import named
from models.sampler import draw_noise, finish

SMILE, STYLE = (f"controls/tiny/{name}.safetensors" for name in ("smile", "watercolour"))
PROMPT = "portrait of a person, red hair"
PLANS = {"base": "base", "student": "student", "plan": "hybrid(1)"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
GRADIO = importlib.util.find_spec("gradio")
needs_gradio = pytest.mark.skipif(not GRADIO, reason="no gradio on this machine: pip install -e '.[live]'")


def studio_of(*words: str) -> Studio:
    return live.opened(load(live.Config, [QUICK, f"controls=[{SMILE},{STYLE}]", *words]))


@pytest.fixture(scope="module")
def studio() -> Studio:
    return studio_of(f"prompt={PROMPT}", "seed=20")


@pytest.fixture(scope="module")
def bare() -> Family:
    """The same family, to which no control was ever attached."""
    return Family(QUICK.removeprefix("family="))


def same(a, b) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def pictures(studio: Studio, wish: Wish) -> list:
    return [studio.picture(way, wish) for way in PLANS]


@torch.no_grad()
def drawn(family: Family, seeds: list[int], plan: str) -> torch.Tensor:
    """Images of a plan of dmd8, drawn without this module."""
    its = named(plan, family.member("base"), family.member("dmd8"))
    noise = draw_noise(seeds, family.latent_shape, its.steps)
    return family.decode(finish(its, noise, family.encode([PROMPT] * len(seeds))))


def test_without_words_it_is_the_student_with_most_guidance_beside_its_base(studio):
    assert studio.names == {"base": "base", "student": "dmd8", "plan": "hybrid(1)"}
    assert [(dial.name, dial.least, dial.most) for dial in studio.dials] == [
        ("smile", -2, 2),
        ("watercolour", 0, 1.5),
    ]
    assert [dial.makes for dial in studio.dials] == ["frowning ↔ smiling", "watercolour"]


def test_all_shipped_controls_have_a_dial():
    found = live.dials_of([], "dmd8", Family("tiny", bare=True))
    names = [control.card.name for control in found]
    assert sorted(names) == sorted(path.stem for path in (ROOT / "controls/tiny").glob("*.safetensors"))
    assert [control.card.kind for control in found] == sorted(
        (control.card.kind for control in found), key=live.ORDER.get
    )


@pytest.mark.parametrize(("way", "plan"), PLANS.items())
def test_a_dial_at_0_is_the_network_to_which_nothing_was_attached(studio, bare, way, plan):
    wish = studio.wish(PROMPT, 3, {"smile": 0, "watercolour": 0.0})
    assert same(studio.picture(way, wish), to_image(to_uint8(drawn(bare, [3], plan))[0]))


def test_hybrid_0_is_the_student():
    studio = studio_of("plan=hybrid(0)")
    assert studio.first == Wish("portrait of a person", 11)
    wish = studio.wish(PROMPT, 5, {"smile": 1})
    assert same(studio.picture("plan", wish), studio.picture("student", wish))
    assert not same(studio.picture("plan", wish), studio.picture("base", wish))


@pytest.mark.slow
def test_a_student_that_is_a_lora_over_its_base_shares_its_dials(tmp_path):
    (tmp_path / "card.yaml").write_text(
        f"extends: tiny\nmembers:\n  base: {{steps: 3}}\n  styled: {{lora: {ROOT / STYLE}, steps: 2}}\n"
    )
    words = [f"family={tmp_path}/card.yaml", "student=styled", f"controls=[{SMILE}]"]
    studio = live.opened(load(live.Config, words))
    assert len(studio.nets) == 1
    plain, smiling = (studio.wish(PROMPT, 3, {"smile": scale}) for scale in (0, -2))
    bare = Family(f"{tmp_path}/card.yaml")
    expected = [bare.draw(bare.member(name), [PROMPT], [3])[0] for name in ("base", "styled")]
    before = pictures(studio, plain)
    assert all(same(a, to_image(to_uint8(b))) for a, b in zip(before[:2], expected, strict=True))
    assert not any(map(same, before, pictures(studio, smiling)))


def test_numbers_that_are_not_finite_are_said(studio):
    with pytest.raises(UserError, match="base gives numbers that are not finite"):
        studio.picture("base", studio.wish(PROMPT, 3, {"smile": 1e38}))


def test_a_dial_changes_the_pictures_and_back_gives_the_same(studio):
    off, on = (studio.wish(PROMPT, 7, {"smile": scale}) for scale in (0, -2))
    before = pictures(studio, off)
    assert not any(map(same, before, pictures(studio, on)))
    assert all(map(same, before, pictures(studio, off)))
    studio.kept.clear()  # drawn anew, not remembered
    assert all(map(same, before, pictures(studio, off)))


def test_what_was_drawn_is_kept(studio, monkeypatch):
    wish = studio.wish(PROMPT, 8, {"watercolour": 1})
    first = pictures(studio, wish)
    monkeypatch.setattr(studio, "drawn", None)
    assert all(map(same, first, pictures(studio, studio.wish(PROMPT, 8, {"watercolour": 1, "smile": 0}))))


def test_what_was_made_first_goes_where_memory_is_full(studio, monkeypatch):
    monkeypatch.setattr("analysis.live.studio.KEPT_BYTES", 1)
    for seed in (9, 10):
        studio.picture("student", studio.wish(PROMPT, seed))
        assert len(studio.kept) == 1


@pytest.mark.parametrize(("way", "steps"), [("base", 3), ("student", 4), ("plan", 4)])
def test_a_film_has_a_frame_per_step_and_ends_with_the_picture(studio, way, steps):
    wish = studio.wish(PROMPT, 3, {"smile": 1.5})
    film = studio.film(way, wish)
    assert len(film.frames) == len(film.t) == steps and film.t == sorted(film.t, reverse=True)
    assert same(film.frames[-1], studio.picture(way, wish)) and not same(*film.frames[-3:-1])


def test_variety_is_the_number_of_the_analyses(studio, bare):
    wish = studio.wish(PROMPT, 20)
    clip = load_evaluators(bare.card, names=["clip"])["clip"]
    expected = {}
    for way, plan in PLANS.items():
        images = drawn(bare, list(range(20, 20 + SEEDS)), plan)
        expected[way] = diversity(clip.features(images))
        variety = studio.variety(way, wish)
        assert variety.distance == pytest.approx(expected[way], rel=1e-5)
        assert variety.of_base == pytest.approx(expected[way]["value"] / expected["base"]["value"], rel=1e-5)
        grid = np.asarray(variety.pictures)
        for k, thumb in enumerate(sheets.thumbs(images)):
            y, x = (66 * part for part in divmod(k, 3))
            assert same(grid[y : y + 64, x : x + 64], to_image(thumb))


def test_the_first_of_nine_is_the_picture_of_the_seed(studio):
    wish = studio.wish(PROMPT, 20)
    nine = np.asarray(studio.variety("student", wish).pictures)[:64, :64].astype(int)
    assert np.abs(nine - np.asarray(studio.picture("student", wish))).max() <= 1


def test_drawings_of_two_threads_do_not_mix(studio):
    wishes = [studio.wish(PROMPT, 30, {"smile": scale}) for scale in (-2, 2, 1, -1)]
    alone = [studio.picture("student", wish) for wish in wishes]
    studio.kept.clear()
    found = {}

    def work(wish: Wish):
        found[wish] = studio.picture("student", wish)

    threads = [Thread(target=work, args=[wish]) for wish in wishes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[wish], picture) for wish, picture in zip(wishes, alone, strict=True))


def test_a_plan_says_what_it_costs(studio):
    assert [page.cost(plan) for plan in studio.plans.values()] == [
        "6 network evaluations, 3 steps",
        "4 network evaluations, 4 steps",
        "4 network evaluations (1 base, 3 dmd8)",
    ]


@pytest.mark.parametrize(
    "positive, negative, said",
    [
        ("portrait of an old person", "portrait of a young person", "young ↔ old"),
        ("crayon portrait", "portrait", "crayon"),
        ("a cat", "", "cat"),
        ("a cat", "a cat", "a cat"),
        ("", "", ""),
    ],
)
def test_two_descriptions_are_said_by_what_they_do_not_share(positive, negative, said):
    assert between(positive, negative) == said


REFUSED = [
    ("student=hyper", "hyper", "lightning"),
    ("student=base", "base itself"),
    ("plan=magic(1)", "magic(1)", "hybrid"),
    ("plan=hybrid(9)", "0 … 4"),
    ("plan=adapted(1)", "analysis.diversity"),
    ("controls=[nowhere.safetensors]", "nowhere.safetensors"),
    (f"controls=[{SMILE},{SMILE}]", "smile", "convert"),
    ("family=nowhere", "nowhere", "tiny"),
    ("dtype=fp7", "fp7", "bf16"),
    ("quantize=int3", "int3"),
    ("memory.gpu_gb=24", "dry run"),
    ("seed=9223372036854775807", "seed"),
    ("port=0", "port"),
    ("port=70000", "port"),
    ("host=nowhere.invalid", "host=nowhere.invalid"),
]


@needs_gradio
@pytest.mark.parametrize("word, says", [(word, says) for word, *says in REFUSED])
def test_what_cannot_be_is_one_line(word, says, monkeypatch):
    monkeypatch.setattr(page, "served", None)
    words = [word] if word.startswith("port=") else ["port=7999", word]
    refused(configured(live, words), *says)


def test_a_control_of_another_family_is_refused_and_left_out_where_it_was_not_asked_for(
    tmp_path, monkeypatch, capsys
):
    control = formats.load(ROOT / STYLE)
    control.card.family = "sdxl"
    (tmp_path / "tiny").mkdir()
    formats.save(control, tmp_path / "tiny/theirs.safetensors")
    monkeypatch.setattr(live, "SHIPPED", tmp_path)
    with pytest.raises(UserError, match="sdxl"):
        live.dials_of([str(tmp_path / "tiny/theirs.safetensors")], "dmd", Family("tiny", bare=True))
    assert live.dials_of([], "dmd", Family("tiny", bare=True)) == [] and "sdxl" in capsys.readouterr().out


@pytest.mark.parametrize(
    "seed, scales, says",
    [
        (-1, {}, "seed"),
        (1.5, {}, "seed"),
        (None, {}, "seed"),
        (float("nan"), {}, "seed"),
        (1, {"beard": 1}, "beard.*smile, watercolour"),
        (1, {"smile": None}, "smile"),
        (1, {"smile": float("inf")}, "smile"),
    ],
)
def test_what_cannot_be_wished(studio, seed, scales, says):
    with pytest.raises(UserError, match=says):
        studio.wish(PROMPT, seed, scales)


def test_a_missing_gradio_is_one_line(monkeypatch):
    def nothing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(page, "import_module", nothing)
    refused(configured(live, []), 'pip install -e ".[live]"')


@needs_gradio
def test_a_taken_port_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused(configured(live, [f"port={taken.getsockname()[1]}"]), "port=")


def test_no_proxy_stands_before_the_own_page_and_the_setting_is_given_back(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "intra.net")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with page.directly("10.0.0.7"):
        assert all(proxy_bypass(host) for host in ("10.0.0.7", "127.0.0.1", "localhost", "intra.net"))
        assert not proxy_bypass("example.org")
    assert os.environ["NO_PROXY"] == "intra.net" and "no_proxy" not in os.environ


def test_help_says_every_key():
    text = ran(lambda: load(live.Config, ["--help"]))
    assert all(key in text for key in ("student", "plan", "controls", "port", "host", "extra live"))


# ---- the page

CONTRAST = Path(__file__).with_name("contrast.js").read_text()
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and GRADIO), reason="no Chromium or no gradio on this machine"
)


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.fixture(scope="module")
def address(studio: Studio):
    with page.served(studio, "127.0.0.1", free_port()) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, address: str):
    """Opens the page; in the end no error was logged, and nothing asked of another place."""
    contexts, wrong = [], []

    def open_page(**options) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        own = (address, address.replace("http:", "ws:"), "data:", "blob:")
        page.on("request", lambda request: request.url.startswith(own) or wrong.append(request.url))
        page.on(
            "console", lambda message: message.type in ("error", "warning") and wrong.append(message.text)
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        page.locator("#pictures img").first.wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def sources(images: Locator) -> list[str]:
    return [image.get_attribute("src") for image in images.all()]


def all_changed(page: Page, selector: str, before: list[str]) -> list[str]:
    """The sources of the images, once none of them is what it was."""
    page.wait_for_function(
        "([selector, before]) => { const now = [...document.querySelectorAll(selector)];"
        " return now.length === before.length && now.every((image, k) => image.src !== before[k]) }",
        arg=[selector, before],
    )
    return sources(page.locator(selector))


@needs_browser
def test_a_dial_is_moved_and_the_pictures_change(opened, studio):
    page = opened()
    images = "#pictures img"
    first = sources(page.locator(images))
    assert page.locator("#pictures figcaption b").all_inner_texts() == ["base", "dmd8", "hybrid(1)"]
    smile = page.get_by_label("range slider for smile")
    smile.focus()
    smile.press("Home")  # -2
    moved = all_changed(page, images, first)
    assert len(set(moved)) == 3
    page.get_by_role("button", name="All to 0").click()
    assert all_changed(page, images, moved) == first
    assert smile.input_value() == "0"


@needs_browser
def test_the_mouse_drags_a_dial_and_its_last_place_counts(opened, studio):
    page = opened()
    first = sources(page.locator("#pictures img"))
    box = page.get_by_label("range slider for smile").bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 2, y, steps=6)
    page.mouse.up()
    all_changed(page, "#pictures img", first)
    scale = float(page.get_by_label("range slider for smile").input_value())
    wish = studio.wish(studio.first.prompt, studio.first.seed, {"smile": scale})
    wanted = [encoded(picture) for picture in pictures(studio, wish)]
    page.wait_for_function(
        "wanted => wanted.every((source, k) => document.querySelectorAll('#pictures img')[k].src === source)",
        arg=wanted,
    )


@needs_browser
def test_prompt_and_seed_are_drawn_and_what_cannot_be_is_said(opened, studio):
    page = opened()
    first = sources(page.locator("#pictures img"))
    prompt = page.get_by_label("Prompt")
    prompt.fill("portrait of a person, hat <b>&amp; ${1 + 1}")
    prompt.press("Enter")
    second = all_changed(page, "#pictures img", first)
    alt = page.locator("#pictures img").first.get_attribute("alt")
    assert alt == "base: portrait of a person, hat <b>&amp; ${1 + 1}, seed 20"
    page.get_by_label("Seed").fill("21")
    page.get_by_label("Seed").press("Tab")
    all_changed(page, "#pictures img", second)
    page.get_by_label("Seed").fill("9223372036854775807")
    page.get_by_label("Seed").press("Tab")
    assert "seed must be" in page.get_by_role("alert").inner_text()


@needs_browser
def test_the_film_follows_the_dials_and_variety_has_its_number(opened, studio):
    page = opened()
    page.get_by_role("tab", name="Film").click()
    page.locator("#film .strip img").first.wait_for()
    assert page.locator("#film .strip").count() == 3 and page.locator("#film .strip img").count() == 11
    before = sources(page.locator("#film .trio img"))
    style = page.get_by_label("range slider for watercolour")
    style.focus()
    style.press("End")
    moved = all_changed(page, "#film .trio img", before)
    style.press("Home")
    assert all_changed(page, "#film .trio img", moved) == before
    page.get_by_role("tab", name="Variety").click()
    page.locator("#variety img").first.wait_for()
    variety = studio.variety("student", studio.first)
    says = page.locator("#variety figure").nth(1).inner_text()
    assert f"{variety.distance['value']:.3f} [" in says
    assert f"{100 * variety.of_base:.0f} % of the base's" in says


@needs_browser
def test_the_page_never_scrolls_sideways(opened):
    page = opened(viewport={"width": 390, "height": 844})
    for tab in ("Film", "Variety", "One seed"):
        page.get_by_role("tab", name=tab).click()
        page.locator("#film .strip img, #variety img").first.wait_for(state="attached")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_all_text(opened, scheme):
    page = opened(color_scheme=scheme)
    assert page.evaluate("[...document.images].every((image) => image.alt)")
    found = page.evaluate(CONTRAST)
    assert len(found) > 30 and not [(round(ratio, 2), what) for ratio, what in found if ratio < 4.5]


def test_the_command_runs_as_a_module():
    assert "keys:" in ran(command("analysis.live", "--help"))
