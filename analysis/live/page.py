"""The page: a thin layer over a studio. Everything comes from this machine, and nothing is sent anywhere."""

import base64
import io
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from analysis.live.studio import Film, Studio, Variety, Wish
from analysis.pages.html import TINY_PX
from analysis.pages.words import number, ranged
from configs import UserError
from configs.errors import explained
from models.sampler import Plan

if TYPE_CHECKING:
    from gradio import Blocks

FOLDER = Path(__file__).parent
TABS = {"pictures": "One seed", "film": "Film", "variety": "Variety"}
FILM_MS, LAST_MS = 2000, 1500  # of a film until its last frame, whatever its steps, and of that one
QUIET = {"show_progress": "hidden", "api_visibility": "private"}  # of what happens at once
QUALITY = 92  # of WebP, for pictures that are not small
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "DejaVu Sans", "sans-serif"]
PARTS = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


def gradio() -> ModuleType:
    """The package, told to send nothing. Raises UserError where it is missing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        return import_module("gradio")
    except ImportError:
        raise UserError('analysis.live needs gradio: pip install -e ".[live]"') from None


def check_place(host: str, port: int) -> None:
    """Raises UserError where no page can be served: before anything is loaded."""
    gradio()
    try:
        with socket.socket() as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind((host, port))
    except UnicodeError:
        raise UserError(f"host={host!r} is no name or address of this machine, such as 127.0.0.1") from None
    except OSError as error:
        raise UserError(
            f"cannot serve a page at host={host} port={port}: {explained(error)}; give another port=…, or a "
            f"host= of this machine, such as 127.0.0.1"
        ) from None


@contextmanager
def served(studio: Studio, host: str, port: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Inside, the page is served: its address, and what waits until it is interrupted."""
    package, blocks = gradio(), built(studio)
    look = package.themes.Base(primary_hue="blue", neutral_hue="stone", font=FONT, font_mono=["monospace"])
    closed = {"share": False, "enable_monitoring": False, "run_history": False, "mcp_server": False}
    how = {"footer_links": [], "ssr_mode": False, "pwa": False, "quiet": True, "prevent_thread_lock": True}
    try:
        with directly(host):
            blocks.launch(
                server_name=host, server_port=port, theme=look, css_paths=FOLDER / "page.css", **how, **closed
            )
        yield f"http://{host}:{port}", blocks.block_thread
    finally:
        blocks.close(verbose=False)


@contextmanager
def directly(host: str) -> Iterator[None]:
    """Inside, no proxy stands between this process and its own page, which gradio asks for."""
    before = {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")}
    others = [value for value in before.values() if value]
    try:
        os.environ.update(dict.fromkeys(before, ",".join([*others, host, "localhost", "127.0.0.1"])))
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def built(studio: Studio) -> "Blocks":
    """The page's parts and what moves them: of the three tabs the open one is drawn."""
    ui, first = gradio(), studio.first
    base, student, plan = studio.names.values()
    with ui.Blocks(title="Distilled control, live", analytics_enabled=False) as blocks:
        ui.HTML(PARTS.get_template("head.html").render(family=studio.family.card.name, **studio.names))
        with ui.Row(elem_classes="asked"):
            prompt = ui.Textbox(first.prompt, label="Prompt", max_lines=2, scale=6, elem_id="prompt")
            seed = ui.Number(first.seed, label="Seed", precision=0, minimum=0, scale=1, min_width=110)
        open_tab = ui.State("pictures")
        views = {}
        with ui.Tabs():
            for key, title in TABS.items():
                with ui.Tab(title, id=key) as tab:
                    views[key] = ui.HTML(elem_id=key, min_height=0)
                tab.select(lambda key=key: key, None, open_tab, **QUIET)
        dials = turned(studio, ui)
        asked = [open_tab, prompt, seed, *dials]
        moved = [blocks.load, open_tab.change, prompt.submit, prompt.blur, seed.change]
        moved += [dial.change for dial in dials]

        def drawn(*values):
            return [shown(studio, key, values) if key == values[0] else ui.skip() for key in views]

        ui.on(
            moved,
            drawn,
            asked,
            list(views.values()),
            show_progress="minimal",
            trigger_mode="always_last",  # of dials that move on while a drawing runs the last place counts
            api_visibility="private",
        )
    return blocks


def turned(studio: Studio, ui: ModuleType) -> list:
    """A dial per control, in two columns, and a button that takes all to 0."""
    with ui.Row(elem_classes="dials-head"):
        ui.HTML(PARTS.get_template("dials.html").render(count=len(studio.dials)))
        zero = ui.Button("All to 0", size="sm", scale=0, min_width=100, interactive=bool(studio.dials))
    with ui.Row(elem_classes="dials"):
        dials = [
            ui.Slider(dial.least, dial.most, 0, step=0.05, label=dial.name, info=dial.makes or None)
            for dial in studio.dials
        ]
    if dials:
        zero.click(lambda: [0] * len(dials), None, dials, **QUIET)
    return dials


def shown(studio: Studio, tab: str, values: tuple) -> str:
    """A tab's contents for what the page holds: the tab, the prompt, the seed, the dials."""
    _, prompt, seed, *scales = values
    try:
        named = zip((dial.name for dial in studio.dials), scales, strict=True)
        wish = studio.wish(prompt or "", seed, dict(named))
        return {"pictures": pictures, "film": films, "variety": varieties}[tab](studio, wish)
    except UserError as error:
        return PARTS.get_template("wrong.html").render(line=str(error))


def pictures(studio: Studio, wish: Wish) -> str:
    columns = [
        column(studio, way, source=encoded(image := studio.picture(way, wish)), size_px=image.width)
        for way in studio.plans
    ]
    return PARTS.get_template("pictures.html").render(columns=columns, wish=wish)


def films(studio: Studio, wish: Wish) -> str:
    columns = []
    for way in studio.plans:
        film = studio.film(way, wish)
        frames = zip(film.frames, film.t, strict=True)
        strip = [{"source": encoded(frame), "t": number(t, 0)} for frame, t in frames]
        still = strip[-1]["source"]
        size_px = film.frames[0].width
        columns.append(column(studio, way, source=moving(film), still=still, strip=strip, size_px=size_px))
    return PARTS.get_template("film.html").render(columns=columns, wish=wish)


def varieties(studio: Studio, wish: Wish) -> str:
    columns = []
    for way in studio.plans:
        variety = studio.variety(way, wish)
        parts = {"source": encoded(variety.pictures), "size_px": variety.pictures.width // 3}
        columns.append(column(studio, way, says=said(variety, way), **parts))
    evaluator = studio.evaluator_name
    return PARTS.get_template("variety.html").render(columns=columns, wish=wish, evaluator=evaluator)


def said(variety: Variety, way: str) -> list[str]:
    """The number under nine seeds, and what share of the base's it is."""
    if variety.distance is None:
        return []
    share = None if variety.of_base is None else 100 * variety.of_base
    beside = [] if way == "base" else [f"{number(share, 0)} % of the base's"]
    return [ranged(variety.distance, 3), *beside]


def column(studio: Studio, way: str, **more) -> dict:
    """What stands under each of the three: its name, and what it costs."""
    small = more["size_px"] < TINY_PX
    about = {"name": studio.names[way], "cost": cost(studio.plans[way]), "says": []}
    return {**about, "small": small, **more}


def cost(plan: Plan) -> str:
    """A plan's network evaluations, by member where there are several."""
    each = {name.rpartition("/")[2]: count for name, count in plan.nfe_by_member.items()}
    if len(each) > 1:
        return f"{plan.nfe} network evaluations ({', '.join(f'{n} {name}' for name, n in each.items())})"
    return f"{plan.nfe} network evaluations, {plan.steps} steps"


def encoded(image: Image.Image) -> str:
    """A picture as an image's src; a small one without loss."""
    data = io.BytesIO()
    image.save(data, "WEBP", lossless=image.width < 3 * TINY_PX, quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def moving(film: Film) -> str:
    """A film as an image's src: it takes the same time whatever its steps, so that three run side by side."""
    first, *others = film.frames
    each = FILM_MS // max(1, len(others))
    how = {"lossless": first.width < TINY_PX, "quality": QUALITY, "loop": 0, "save_all": True}
    data = io.BytesIO()
    first.save(data, "WEBP", append_images=others, duration=[each] * len(others) + [LAST_MS], **how)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
