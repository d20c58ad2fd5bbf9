"""What a transfer leaves beside its page: printed rows, table.csv and table.tex, figures."""

import copy
import csv
import xml.etree.ElementTree as ET

import pytest
from support import synthetic

from analysis.pages import figures, rows, tables, transfer, words


@pytest.fixture(scope="module")
def record() -> dict:
    return synthetic.results()


def test_a_row_per_control_within_100_columns(record, capsys):
    table = rows.Rows(["dmd", "lcm", "lightning"])
    for count in (5, 10, 15, 15):  # cells of one control, of two, of all, of all again
        table.show(record["cells"][:count])
    lines = capsys.readouterr().out.splitlines()
    heads, smile, _, dmd = lines
    assert all(len(line) <= rows.WIDTH for line in [*lines, *rows.LEGEND.splitlines()])
    assert heads.split() == ["control", "from", "dmd", "lcm", "lightning"]
    cell = words.led(record["cells"][1])
    mark, retention = words.MARKS[cell["verdict"]], words.ranged(cell["retention"])
    assert smile.startswith("smile          base   ") and f"{mark} {retention} ×" in smile
    assert dmd.startswith("eyes-dmd       dmd ") and dmd[22:30].strip() == "", "not judged on its own source"


def test_many_targets_take_several_lines_and_leave_the_intervals_out(record, capsys):
    cells = copy.deepcopy(record["cells"][:5])
    names = [f"student-{k}" for k in range(9)]
    cells = [cells[0], *({**cells[1], "target": f"tiny/{name}"} for name in names)]
    rows.Rows(names).show(cells)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(len(line) <= rows.WIDTH and "[" not in line for line in lines)


def test_every_members_name_is_printed_whole_beside_six(record, capsys):
    table = rows.Rows([f"s{k}" for k in range(6)])
    table.show([{**cell, "source": "tiny/lightning", "target": "tiny/s0"} for cell in record["cells"][1:2]])
    heads, row = capsys.readouterr().out.splitlines()
    assert row[rows.NAME :].startswith("lightning ") and len(heads) <= rows.WIDTH and "…" not in row


def test_a_long_name_stands_on_a_line_of_its_own(record, capsys):
    name = "watercolour-kv-lightning"
    rows.Rows(["dmd"]).show([{**cell, "control": name} for cell in record["cells"][:2]])
    _, own, row = capsys.readouterr().out.splitlines()
    assert own == name and row.startswith(" " * rows.NAME + "base")


def test_the_tables_hold_every_number_and_escape_names(record, tmp_path):
    tables.write(record, tmp_path)
    read = list(csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8")))
    cells = record["cells"]
    assert len(read) == len(cells) * len(synthetic.UNIT)
    reading = cells[1]["readings"]["clip"]
    assert float(read[2]["retention low"]) == reading["retention"]["low"]
    assert float(read[2]["retention below 0"]) == reading["below_zero"]["retention"]["value"]
    assert float(read[2]["p of dead"]) == reading["p"]["dead"]["p_holm"] and read[2]["looks"] == "1"
    tex = (tmp_path / "table.tex").read_text()
    assert tex.count(r" \\") == 1 + len(synthetic.CONTROLS) and tex.count("&") == 5 * tex.count(r" \\")
    assert tables.escaped("50 % of a_b") == r"50 \% of a\_b"


def test_figures_are_whole_svg_and_pdf_files(record, tmp_path):
    paths = figures.write(transfer.charts_of(record), tmp_path)
    assert len(paths) == 2 * len(synthetic.CONTROLS) * (len(synthetic.UNIT) + 1)
    for path in paths:
        content = path.read_bytes()
        if path.suffix == ".pdf":
            assert content.startswith(b"%PDF-") and content.rstrip().endswith(b"%%EOF")
            continue
        root = ET.fromstring(content)
        assert root.get("width") and not any(
            "class" in element.attrib or "var(" in str(element.attrib) for element in root.iter()
        )
    again = figures.write(transfer.charts_of(record), tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


def test_a_figure_of_letters_that_pdf_lacks_is_drawn():
    group = [{**words.led(cell), "control": "улыбка 🙂"} for cell in synthetic.results(["smile"])["cells"]]
    chart = str(transfer.dose_response(group, "clip", words.members_of(group)))
    assert figures.pdf(figures.standalone(chart)).startswith(b"%PDF-")
