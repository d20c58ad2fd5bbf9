"""Saves a layout of panels for this toolkit's W&B keys as a view of the project: python -m analysis.dashboard
[config=FILE] [key=value ...]

The panels are for the controls and members of one transfer run, which `python -m analysis.transfer` makes.
Needs a login at W&B and the extra `dashboard`. What the keys mean stands in docs/wandb.md.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from analysis import results
from analysis.pages import words
from configs import UserError, entry, tracking

# title: rows of (kind of panel, its title, its keys); one panel per <control>, with every <member>, <target>,
# <evaluator>
SECTIONS = {
    "Training": [
        ("lines", "loss", "loss"),
        ("images", "strips: seeds in rows, scales in columns", "samples"),
        ("lines", "effect on each member", "watch/effect/<member>"),
        ("lines", "retention on each member", "watch/retention/<member>/value"),
        ("lines", "gradient norm before clipping", "gradient"),
        ("lines", "learning rate", "learning_rate"),
    ],
    "Transfer": [
        ("images", "retention", "transfer/heat/<evaluator>"),
        ("table", "cells", "transfer/cells"),
        ("table", "leakage", "transfer/leakage"),
        ("bars", "retention of <control>", "retention/<control>/<target>"),
        (
            "bars",
            "scale of <control> that matches the source's effect at 1",
            "matched_scale/<control>/<target>",
        ),
        ("curves", "effect of <control>", "curves/<control>_table"),
    ],
    "Images": [("images", "<control>, a step per scale", "images/<control>/<target>")],
    "Why": [
        ("images", "x0 over the steps, members in columns", "trace/animation"),
        ("table", "when x0 commits", "trace/commitment"),
        ("table", "diversity, recovery, agreement, cost of every plan", "diversity/plans"),
        ("table", "whether anything foretells retention", "similarity/predictors"),
    ],
}
COLUMNS = {"Training": 3, "Transfer": 2, "Images": 1, "Why": 2}  # panels beside one another


@dataclass
class Config:
    run: str = "runs/transfer/default"  # folder of the transfer run whose controls and members get panels
    name: str = "Controls and what survives"  # of the view; each call saves a new one
    entity: str = ""  # W&B user or team; empty = $WANDB_ENTITY, else who is logged in
    project: str = ""  # W&B project; empty = $WANDB_PROJECT, else distilled-control


def main(cfg: Config) -> None:
    """Builds the view and saves it; W&B prints its address."""
    toolkit()
    if not tracking.logged_in():
        raise UserError(
            "not logged in to W&B: run `wandb login` once, or set WANDB_API_KEY; a dashboard is kept by "
            "the server alone"
        )
    cells = results.read(Path(cfg.run), "analysis.transfer")["cells"]
    import wandb

    try:
        entity = cfg.entity or os.environ.get("WANDB_ENTITY") or wandb.Api().default_entity
        layout(cells, entity, cfg.project or tracking.project(), cfg.name).save()
    except (
        Exception
    ) as error:  # of the network, the login, the server: W&B has many, and none of them is ours to unwind
        raise UserError(f"W&B did not save the dashboard: {type(error).__name__}: {error}") from None


def toolkit() -> tuple[Any, Any]:
    """W&B's modules of panels and of workspaces. Raises UserError without the extra."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise UserError("the dashboard needs wandb-workspaces: pip install -e '.[dashboard]'") from None
    return panels, workspaces


def layout(cells: list[dict], entity: str, project: str, name: str) -> Any:
    """A workspace, not saved yet, with panels for the controls, targets and evaluators of these cells."""
    panels, workspaces = toolkit()
    sections = [
        workspaces.Section(
            name=title,
            panels=list(drawn(rows, cells, kinds(panels))),
            is_open=True,
            layout_settings=workspaces.SectionLayoutSettings(columns=COLUMNS[title], rows=4),
        )
        for title, rows in SECTIONS.items()
    ]
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections)


def drawn(rows: list[tuple[str, str, str]], cells: list[dict], make: dict[str, Callable]) -> Iterator[Any]:
    """The panels of one section."""
    for kind, title, pattern in rows:
        for control in dict.fromkeys(cell["control"] for cell in cells) if "<control>" in pattern else [""]:
            yield make[kind](title.replace("<control>", control), filled(pattern, cells, control))


def filled(pattern: str, cells: list[dict], control: str = "") -> list[str]:
    """The keys that a pattern stands for; a member is a target without a plan of its own."""
    targets = list(dict.fromkeys(cell["target"] for cell in cells))
    names = {
        "<target>": targets,
        "<member>": [t for t in targets if ":" not in t],
        "<evaluator>": words.evaluators_of(cells),
        "<control>": [control],
    }
    here = {mark: values for mark, values in names.items() if mark in pattern}
    fillings = [dict(zip(here, values, strict=True)) for values in product(*here.values())]
    # all in one pass, for a name may look like a mark
    return [re.sub(r"<\w+>", lambda mark, filling=filling: filling[mark[0]], pattern) for filling in fillings]


def kinds(panels: Any) -> dict[str, Callable[[str, list[str]], Any]]:
    """Kind to a function of title and keys that makes the panel; curves are as wandb.plot.line_series draws
    them.
    """
    fields = {name: name for name in ("step", "lineKey", "lineVal")}
    return {
        "lines": lambda title, keys: panels.LinePlot(title=title, y=keys),
        "bars": lambda title, keys: panels.BarPlot(title=title, metrics=keys),
        "images": lambda title, keys: panels.MediaBrowser(
            title=title, media_keys=keys, num_columns=len(keys)
        ),
        "table": lambda title, keys: panels.WeavePanelSummaryTable(table_name=keys[0]),
        "curves": lambda title, keys: panels.CustomChart(
            query={"summaryTable": {"tableKey": keys[0]}},
            chart_name="wandb/lineseries/v0",
            chart_fields=fields,
            chart_strings={"title": title, "xname": "scale"},
        ),
    }


if __name__ == "__main__":
    entry(main, Config)
