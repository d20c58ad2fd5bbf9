"""The charts of a transfer's page as files of their own, .svg and .pdf, for papers and slides."""

import re
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from pathlib import Path

from configs import plain_name, replacing

NAMESPACE = "http://www.w3.org/2000/svg"
INK, SOFT, LINE, TINT, PAPER = "#1d2125", "#5c646c", "#dcd8d0", "#f3f0ea", "#ffffff"
COLOURS = (INK, "#0072b2", "#b54a00", "#007d5a", "#a04a83", "#7a6000", "#2c7197")  # as page.css, on white
RULES: list[tuple[set[str], dict[str, str]]] = [  # classes of an element: what they mean; later ones win
    *(({f"c{k}"}, {"stroke": colour, "fill": colour}) for k, colour in enumerate(COLOURS)),
    ({"first"}, {"fill": INK, "stroke": INK}),
    ({"second"}, {"fill": PAPER, "stroke": COLOURS[1], "stroke-width": "2"}),
    ({"floor"}, {"fill": COLOURS[2], "stroke": COLOURS[2]}),
    ({"ceiling"}, {"fill": COLOURS[3], "stroke": COLOURS[3]}),
    ({"wrong"}, {"fill": "none", "stroke": COLOURS[4], "stroke-width": "2"}),
    ({"grid"}, {"stroke": LINE}),
    ({"axis"}, {"stroke": SOFT}),
    ({"window"}, {"fill": TINT}),
    ({"margin"}, {"fill": "#808080", "fill-opacity": ".2"}),
    ({"curve"}, {"fill": "none", "stroke-width": "2.2"}),
    ({"band"}, {"stroke": "none", "fill-opacity": ".13"}),
    ({"curve", "dashed"}, {"stroke-dasharray": "5 4"}),
    ({"ends"}, {"stroke-width": "2"}),
    ({"label"}, {"font-weight": "bold", "fill": INK}),
]
LATIN = str.maketrans({"−": "-", "→": ">", "…": "...", "–": "-", "“": '"', "”": '"'})  # for PDF's own fonts


def write(charts: dict[str, str], folder: Path) -> list[Path]:
    """name.svg and name.pdf of every chart, an inline SVG of the page, that is not empty."""
    paths = []
    for name, chart in charts.items():
        if not chart:
            continue
        drawing = standalone(str(chart))
        for suffix, content in ((".svg", drawing.encode()), (".pdf", pdf(drawing))):
            path = Path(folder) / f"{plain_name(name, 'figure')}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as new:
                new.write_bytes(content)
            paths.append(path)
    return paths


def standalone(chart: str) -> str:
    """An SVG that needs no style sheet, on white."""
    ET.register_namespace("", NAMESPACE)
    root = ET.fromstring(chart.replace("<svg ", f'<svg xmlns="{NAMESPACE}" ', 1))
    _, _, width, height = root.get("viewBox").split()
    root.set("width", width)
    root.set("height", height)
    root.set("font-family", "Helvetica, Arial, sans-serif")
    for element in root.iter():
        _inline(element)
    root.insert(0, ET.Element(f"{{{NAMESPACE}}}rect", {"width": width, "height": height, "fill": PAPER}))
    return ET.tostring(root, encoding="unicode")


def _inline(element: ET.Element) -> None:
    """What an element's classes and its style mean, as attributes."""
    if element.tag.endswith("}text"):
        for key, value in (("font-size", "12"), ("fill", SOFT), ("stroke", "none")):
            element.set(key, value)
    classes = set(element.attrib.pop("class", "").split())
    for needed, attributes in RULES:
        if needed <= classes:
            for key, value in attributes.items():
                element.set(key, value)
    for pair in filter(None, element.attrib.pop("style", "").split(";")):
        key, value = (part.strip() for part in pair.split(":", 1))
        colour = re.fullmatch(r"var\(--c(\d)\)", value)
        element.set(key, COLOURS[int(colour[1])] if colour else value)


def pdf(drawing: str) -> bytes:
    """An SVG as one page of its size. Letters that PDF's own fonts lack become "?"."""
    from fpdf import FPDF  # takes a third of a second
    from fpdf.svg import SVGObject

    text = drawing.translate(LATIN).encode("latin-1", "replace").decode("latin-1")
    svg = SVGObject(text)
    page = FPDF(unit="pt", format=(svg.width, svg.height))
    page.set_creation_date(datetime(2000, 1, 1, tzinfo=UTC))  # the same chart, the same file
    page.set_margin(0)
    page.set_auto_page_break(False)
    page.add_page()
    page.set_font("Helvetica", size=12)
    svg.draw_to_page(page, 0, 0)
    return bytes(page.output())
