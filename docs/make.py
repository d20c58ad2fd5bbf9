"""Writes what no hand writes in README.md and docs/: python docs/make.py [RUN …], or make docs

Those are the blocks between <!-- name --> and <!-- /name -->: tables from docs/records, families and members
from their cards, keys from the commands' dataclasses. A RUN is the folder of a run of an analysis, whose
numbers are first taken into docs/records.
"""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import configs  # noqa: E402
from analysis import results  # noqa: E402
from analysis.pages.words import number, percent, ranged  # noqa: E402
from configs.options import usage  # noqa: E402
from docs.claims import claims  # noqa: E402
from models import cards  # noqa: E402
from models.loading import source  # noqa: E402
from train.bench import figures  # noqa: E402

DOCS, RECORDS, README = ROOT / "docs", ROOT / "docs/records", ROOT / "README.md"
COMMANDS = {  # module: how it is called
    "train.slider": "accelerate launch train/slider.py",
    "train.image_slider": "accelerate launch train/image_slider.py",
    "train.lora": "accelerate launch train/lora.py",
    "train.sliderspace": "accelerate launch train/sliderspace.py",
    "train.adapt": "accelerate launch train/adapt.py",
    "analysis.transfer": "python -m analysis.transfer",
    "analysis.trace": "python -m analysis.trace",
    "analysis.diversity": "python -m analysis.diversity",
    "analysis.similarity": "python -m analysis.similarity",
    "analysis.live": "python -m analysis.live",
    "analysis.dashboard": "python -m analysis.dashboard",
    "controls.show": "python -m controls.show FILE …",
    "controls.generate": "python -m controls.generate",
    "controls.convert": "python -m controls.convert FROM TO",
    "controls.merge": "python -m controls.merge A B … TO",
    "controls.workflow": "python -m controls.workflow",
    "models.budget": "python -m models.budget",
}
KEPT = {  # of a record: what the pages tell, everything else stays in the run's own folder
    "analysis.transfer": {
        "readings": {
            *("retention", "below_zero", "slope_retention", "of_words"),
            *("verdict", "matched_scale", "references"),
        }
    },
    "analysis.trace": {"commitment", "abandoned"},
    "analysis.diversity": {
        *("diversity", "of_base", "gain", "recovery", "claims", "shares", "teacher_guidance"),
        *("agreement_gain", "agreement_of_base", "quality"),
    },
}
ABOUT = {
    "control",
    "adapted_from",
    "kind",
    "source",
    "target",
    "reference",
    "scales",
    "prompts",
    "seeds",
    "looks",
    "images",
    "clip_change_percent",
    "student",
    "plan",
    "nfe",
    "seconds",
}
VARIETY = {  # rows of README's other table
    "teacher": "",
    "student": "",
    "hybrid(1)": "`hybrid(1)`: the base's weights in its first step, the paper's",
    "hybrid(2)": "`hybrid(2)`: in two",
    "hybrid(3)": "`hybrid(3)`: in three",
    "skip(1)": "`skip(1)`: its first step left out",
    "cads(0.1)": "`cads(0.1)`: noise on its prompts",
}
SHOWN = ("smile", "age", "watercolour", "watercolour-kv", "space-1")  # rows of README's table


def main(folders: list[str]) -> None:
    """Takes the records of these runs, then writes every page."""
    for folder in folders:
        take(Path(folder))
    for path, text in pages().items():
        with configs.replacing(path) as new:
            new.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


def take(folder: Path) -> None:
    """What the pages need of a run's record, into docs/records/<command>-<name>.json. Raises UserError."""
    record = results.read(folder)
    command = record["recipe"]
    cells = [slim(cell, KEPT[command]) for cell in wanted(record["cells"])]
    kept = {
        key: record[key]
        for key in (
            *("schema", "recipe", "command", "created", "versions"),
            *("evaluators", "margin", "prompts", "agreement"),
        )
        if key in record
    }
    where = ("out=", "cache=", "wandb=", "transfer=")  # words that change no number
    kept["command"] = " ".join(word for word in kept["command"].split() if not word.startswith(where))
    path = RECORDS / f"{command.rpartition('.')[2]}-{folder.resolve().name}.json"
    with configs.replacing(path) as new:
        new.write_text(
            json.dumps(rounded({**kept, "cells": cells}), ensure_ascii=False, allow_nan=False) + "\n"
        )


def wanted(cells: list[dict]) -> list[dict]:
    """All cells; where controls were adapted these alone, with their originals on the same targets."""
    pairs = {(c["adapted_from"], c["target"]) for c in cells if c.get("adapted_from")}
    return (
        [c for c in cells if c.get("adapted_from") or (c.get("control"), c["target"]) in pairs]
        if pairs
        else cells
    )


def slim(cell: dict, wanted: set[str] | dict) -> dict:
    """The parts of a cell that the pages tell; of curves the last value alone."""
    kept = {key: value for key, value in cell.items() if key in ABOUT or key in wanted}
    for reading in kept.get("readings", {}).values():
        for key in reading.keys() - wanted["readings"]:
            del reading[key]
    if "diversity" in kept:
        kept["diversity"] = {name: curve[-1] for name, curve in kept["diversity"].items()}
    if "abandoned" in kept:
        kept["abandoned"] = {key: kept["abandoned"][key] for key in ("evaluator", "falls", "rises_and_falls")}
    return kept


def rounded(value: Any) -> Any:
    """The same with four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def pages() -> dict[Path, str]:
    """Path to text of every page that holds blocks. Raises UserError for a block that a page lacks."""
    written = {
        README: {"table": short_table, "variety": short_variety, "adapted": short_adapted},
        DOCS / "results.md": {
            "claims": lambda: markdown(*claims(record)),
            "transfer": transfer_table,
            "adapted": partial(adapted_table, "transfer-adapted"),
            "loras": partial(adapted_table, "transfer-loras"),
            "trace": trace_table,
            "losses": losses,
            "plans": plan_table,
        },
        DOCS / "families.md": {"sizes": sizes, "full": full_size, "gpu": figures.docs, "members": members},
        DOCS / "commands.md": {"commands": commands},
    }
    texts = {}
    for path, blocks in written.items():
        text = path.read_text(encoding="utf-8")
        for name, write in blocks.items():
            block = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.S)
            if not block.search(text):
                raise configs.UserError(
                    f"{path.relative_to(ROOT)} has no block <!-- {name} --> … <!-- /{name} -->"
                )
            made = write()
            text = block.sub(lambda mark, made=made: mark[1] + made + mark[2], text)
        texts[path] = text
    return texts


def record(name: str) -> dict:
    return json.loads((RECORDS / f"{name}.json").read_text())


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def commands() -> str:
    """Every command with its keys, as --help prints them."""
    parts = []
    for module, call in COMMANDS.items():
        text = usage(importlib.import_module(module).Config).replace(str(ROOT), ".")
        parts += [f"## {module}", f"`{call}`", f"```text\n{text.strip()}\n```"]
    return "\n\n".join(parts)


def family_cards() -> list[cards.FamilyCard]:
    return [cards.card(name) for name in record("sizes")]


def sizes() -> str:
    """A row per family: its members, licence and sizes."""
    heads = [
        "family",
        "members",
        "licence of the base",
        "GB to download: shared, each network",
        "GB in bf16: shared, each network",
    ]
    rows = [
        [f"`{family.name}`", ", ".join(family.members), family.licence, *record("sizes")[family.name]]
        for family in family_cards()
    ]
    return markdown(heads, rows)


def full_size() -> str:
    """What commands took at full size beside what their plans said."""
    rows = []
    for part, its in record("full-size").items():
        forecast, outside = its["forecast_gb"], its["outside"]
        off = "" if forecast is None else f"{forecast:.1f} ({100 * (forecast / its['gb'] - 1):+.0f} %)"
        rows.append(
            [part, its["device"], f"{its['gb']:.1f}", off, "" if outside is None else f"{outside:.1f} %"]
        )
    return markdown(["part", "on", "GB at the fullest", "GB forecast", "outside the networks"], rows)


def members() -> str:
    """A row per member as its card has it: files, steps, licence."""
    rows = []
    for family in family_cards():
        for name, member in family.members.items():
            file = member.file or member.lora
            where = source(family, member)[0] + (f", `{file}`" if file else "")
            steps = len(member.timesteps) or member.steps
            rows.append([f"{family.name}/{name}", where, f"{steps}", member.licence or family.licence])
    return markdown(["member", "files", "steps", "licence"], rows)


def made(kept: dict) -> str:
    """The command, the day and the design of a record."""
    cell, torch = kept["cells"][0], kept.get("versions", {}).get("torch", "?")
    rounds = kept.get("prompts")
    looks = rounds if rounds and isinstance(rounds[0], int) else [cell["prompts"]]
    prompts = " to ".join(dict.fromkeys((str(looks[0]), str(looks[-1])))) + " prompts"
    design = f"{prompts} × {cell['seeds']} seeds"
    return f"`{kept['command']}`, {kept['created'][:10]}, torch {torch}: {design}.\n\n"


def targets_of(cells: list[dict]) -> list[str]:
    """The targets in order of appearance, those for comparison last."""
    return list(dict.fromkeys(cell["target"] for cell in sorted(cells, key=lambda cell: cell["reference"])))


def short_table() -> str:
    """README's table: a row per control of SHOWN, a column per student, by the first evaluator."""
    cells = {(cell["control"], cell["target"]): cell for cell in record("transfer-all")["cells"]}
    students = [
        target for target in targets_of(list(cells.values())) if target != "tiny/base" and ":" not in target
    ]
    rows = [[name, *(brief(cells[name, student]) for student in students)] for name in SHOWN]
    return markdown(
        ["trained on the base", *(f"on {student.partition('/')[2]}" for student in students)], rows
    )


def short_variety() -> str:
    """README's table: what brings the variety of the student that collapses back."""
    cells = {cell["plan"]: cell for cell in record("diversity-full")["cells"]}
    names = VARIETY | {"student": cells["student"]["student"]}
    names["teacher"] = f"the base at guidance {cells['student']['teacher_guidance']:g}"
    rows = []
    for plan, name in names.items():
        cell = cells[plan]
        by = (said(cell, "base", cell["of_base"], evaluator) for evaluator in ("clip", "probe"))
        rows.append([name, f"{cell['nfe']:g}", *by, number(cell["agreement_of_base"]["value"])])
    return markdown(["", "evaluations", "of the base's variety, by CLIP", "by the probe", "obedience"], rows)


def adapted_pairs(name: str) -> list[tuple[dict, dict]]:
    """What was adapted in a run: the original's cell and the adapted control's, by control."""
    cells = record(name)["cells"]
    found = {(cell["control"], cell["target"]): cell for cell in cells}
    return [
        (found[cell["adapted_from"], cell["target"]], cell)
        for cell in cells
        if cell["adapted_from"] and cell["target"] != cell["source"]
    ]


def short_adapted() -> str:
    """README's rows: the controls that survive on no student, adapted to every one."""
    rows: dict[str, dict[str, str]] = {}
    for before, after in adapted_pairs("transfer-loras"):
        rows.setdefault(before["control"], {})[after["target"]] = brief(after)
    heads = [f"on {target.partition('/')[2]}" for target in next(iter(rows.values()))]
    return markdown(["", *heads], [[f"{name}, adapted", *cells.values()] for name, cells in rows.items()])


def adapted_table(name: str) -> str:
    """Controls and members in rows: before and after, by every evaluator."""
    pairs = adapted_pairs(name)
    evaluators, rows = list(pairs[0][0]["readings"]), []
    for before, after in pairs:
        each = [f"{brief(before, its)}<br>→ {brief(after, its)}" for its in evaluators]
        rows.append([before["control"], after["target"].partition("/")[2], *each])
    return made(record(name)) + markdown(["control", "on", *(f"by {its}" for its in evaluators)], rows)


def brief(cell: dict, name: str = "") -> str:
    """A retention with its interval and verdict."""
    reading = cell["readings"][name or next(iter(cell["readings"]))]
    return f"{ranged(reading['retention'])} {reading['verdict']}"


def transfer_table() -> str:
    """Controls in rows, targets in columns."""
    kept = record("transfer-all")
    cells, targets = (
        {(cell["control"], cell["target"]): cell for cell in kept["cells"]},
        targets_of(kept["cells"]),
    )
    sources = {cell["control"]: cell["source"].partition("/")[2] for cell in kept["cells"]}
    rows = [
        [f"{name} (from {source_name})", *("<br>".join(lines(cells[name, target])) for target in targets)]
        for name, source_name in sources.items()
    ]
    return made(kept) + markdown(["control", *(f"on {target.partition('/')[2]}" for target in targets)], rows)


def lines(cell: dict) -> Iterator[str]:
    """What stands in a cell of the transfer table, line by line."""
    change_text = percent(cell["clip_change_percent"])
    if cell["source"] == cell["target"]:
        yield from ("source", change_text)
        return
    (_, first), *others = cell["readings"].items()
    verdict = "" if cell["reference"] else first["verdict"]
    value, _, ends = ranged(first["retention"]).partition(" ")
    yield f"**{value}** {ends} {verdict}".strip()
    for name, reading in others:
        verdict = "" if cell["reference"] else reading["verdict"]
        yield f"{name} {number(reading['retention']['value'])} {verdict}".strip()
    if first["below_zero"]:
        differs = " differs" if first["below_zero"]["differs"] else ""
        yield f"below 0 {number(first['below_zero']['retention']['value'])}{differs}"
    yield f"{matched(first['matched_scale'])}, {change_text}"
    shares = {name: (first["references"].get(name) or {}).get("share") for name in ("floor", "ceiling")}
    if any(shares.values()):
        yield ", ".join(f"{name} {number(share['value'])}" for name, share in shares.items() if share)


def matched(scale: dict) -> str:
    """The scale to use, or how much of the source's effect is reached at most."""
    if scale["value"] is not None:
        return f"scale {number(scale['value'])}"
    return f"≤ {min(round(100 * scale['reach']['share']), 99)} %" if scale.get("reach") else "–"


def trace_table() -> str:
    """Members and plans in rows: after which share of the steps x0 stays near the final image."""
    kept = record("trace-default")
    names, rows = kept["evaluators"], []
    for cell in kept["cells"]:
        shares = [ranged(cell["commitment"][name]["share"]) for name in names]
        rows.append(
            [cell["student"], cell["plan"], *shares, interval(cell["abandoned"]["rises_and_falls"], 2)]
        )
    heads = ["member", "plan", *(f"share of the steps, by {name}" for name in names)]
    return made(kept) + markdown([*heads, "images in which a concept rises and falls"], rows)


def plan_table() -> str:
    """Every run of analysis.diversity that was kept: students and plans in rows."""
    heads = [
        *("student", "plan", "nfe", "of the base's, by CLIP", "by the probe", "recovered, by CLIP"),
        *("by the probe", "gain in agreement", "Fréchet distance"),
    ]
    parts = []
    for path in sorted(RECORDS.glob("diversity-*.json")):
        kept = record(path.stem)
        parts.append(made(kept) + markdown(heads, [plan_row(cell) for cell in kept["cells"]]))
    return "\n\n".join(parts)


def plan_row(cell: dict) -> list[str]:
    frechet = (cell.get("quality") or {}).get("frechet_clip")
    alone = cell["plan"] in ("base", "student")
    return [
        *(cell["student"], cell["plan"], f"{cell['nfe']:g}"),
        *(said(cell, "base", cell["of_base"], name) for name in ("clip", "probe")),
        *("–" if alone else said(cell, "student", cell["recovery"], name) for name in ("clip", "probe")),
        *(interval(cell.get("agreement_gain"), 1), interval(frechet, 3)),
    ]


def said(cell: dict, beside: str, values: dict, name: str) -> str:
    """A number of a plan beside the base or its student, with the verdict on the difference."""
    claims = (cell.get("claims") or {}).get(beside)
    return f"{interval(values.get(name), 2)} {claims[name]['verdict']}" if claims else "–"


def losses() -> str:
    """What each student's loss of variety is made of, of every run of analysis.diversity that was kept."""
    heads = [
        "student",
        "guidance distilled in",
        "by",
        "of the base's",
        "share of guidance",
        "of distillation",
    ]
    rows = {}
    for kept in (record(path.stem) for path in sorted(RECORDS.glob("diversity-*.json"))):
        for cell in kept["cells"]:
            for name, parts in ((cell.get("shares") or {}) if cell["plan"] == "student" else {}).items():
                shares = [interval(parts[key], 2) for key in ("guidance", "distillation")]
                about = [cell["student"], f"{cell['teacher_guidance']:g}", name]
                rows[cell["student"], name] = [*about, said(cell, "base", cell["of_base"], name), *shares]
    return markdown(heads, list(rows.values()))


def interval(value: dict | None, digits: int) -> str:
    return ranged(value, digits) if value else "–"


if __name__ == "__main__":
    configs.entry(lambda: main(sys.argv[1:]))
