"""The rules of CONTRIBUTING.md that a program can keep."""

import ast
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import controls.lora
import models.cards
from configs import ROOT, merge
from configs.ranges import RANGES

ALLOWED = {  # package: the packages it may import besides itself
    "configs": set(),
    "models": {"configs"},
    "controls": {"configs", "models"},
    "train": {"configs", "models", "controls"},
    "analysis": {"configs", "models", "controls"},
}
HEAVY = {
    "torch",
    "torchvision",
    "torchmetrics",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
}
SCHEMAS = {  # folder under configs/: module and dataclass of its YAMLs
    "families": ("models.families", "FamilyCard"),
    "sliders": ("train.slider", "Config"),
    "loras": ("train.lora", "Config"),
    "image_sliders": ("train.image_slider", "Config"),
    "sliderspaces": ("train.sliderspace", "Config"),
    "transfer": ("analysis.transfer", "Config"),
    "similarity": ("analysis.similarity", "Config"),
    "trace": ("analysis.trace", "Config"),
    "diversity": ("analysis.diversity", "Config"),
}
PAPER = {"t1": "transfer", "t1-car": "transfer", "fig5": "trace"}  # the others are of analysis.diversity
EVERY = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "configs").rglob("*.yaml"))]
YAMLS = [path for path in EVERY if not path.startswith("configs/accelerate/")]  # those are accelerate's own
RECIPES = [path for path in YAMLS if not path.startswith("configs/families/")]


def imported(path: Path) -> set[str]:
    """The dotted names that a file imports anywhere; `from a import b` gives both a and a.b."""
    names = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def source(module: str) -> Path | None:
    """The file of one of our modules, None for a name that is no module."""
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def ours(names: set[str]) -> set[str]:
    """Those of our modules that importing the names runs, packages above them included."""
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] in ALLOWED:
            found |= {".".join(parts[:k]) for k in range(1, len(parts) + 1)}
    return {name for name in found if source(name)}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_downward(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in sorted(imported(path))
        if name.split(".")[0] in (ALLOWED.keys() | {"tests"}) - ALLOWED[package] - {package}
    ]
    assert not wrong


def test_the_report_reads_files_and_imports_no_torch():
    seen, todo = set(), {"analysis.report"}
    while todo:
        module = todo.pop()
        seen.add(module)
        names = imported(source(module))
        assert module.split(".")[0] in ("analysis", "configs", "controls"), f"the report reaches {module}"
        assert not {name.split(".")[0] for name in names} & HEAVY, (
            f"{module}, which the report reaches, imports a heavy library"
        )
        todo |= ours(names) - seen


def test_importing_the_report_loads_no_torch():
    code = "import sys, analysis.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_transfer_run_with_nothing_new_need_not_wait_for_heavy_libraries():
    code = (
        "import sys, analysis.transfer; sys.exit(str({'diffusers', 'transformers', 'peft'} & "
        "set(sys.modules)))"
    )
    assert (
        "set()"
        in subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stderr
    )


def test_no_file_in_train_shadows_a_library():
    """accelerate launch train/x.py puts train/ first on sys.path, so that train/types.py would be everybody's
    `types`.
    """
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    for folder in ("train", "train/bench"):
        names = {path.stem for path in (ROOT / folder).iterdir()} - {"__init__", "__pycache__"}
        assert names and not names & taken


def test_every_folder_of_configs_has_a_schema():
    assert YAMLS
    assert {path.split("/")[1] for path in YAMLS} <= SCHEMAS.keys() | {"paper"}, "add a row to SCHEMAS"


@pytest.mark.parametrize("path", [path for path in EVERY if path not in YAMLS])
def test_accelerate_launches_by_a_shipped_config_without_a_word(path, caplog):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    words = ["--config_file", str(ROOT / path), "train/slider.py"]
    settings, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert not caplog.records and settings.mixed_precision == "no"
    assert settings.num_processes == (8 if settings.multi_gpu else 1)


@pytest.mark.parametrize("path", YAMLS)
def test_yaml_loads_against_its_schema(path):
    folder, paper = path.split("/")[1], PAPER.get(Path(path).stem, "diversity")
    module, name = SCHEMAS[paper if folder == "paper" else folder]
    merge(getattr(importlib.import_module(module), name), path)


def schemas() -> set[type]:
    """The dataclasses that are read from files and command lines: every Config and card, and what stands in
    them.
    """
    found, todo = set(), [controls.lora.Card, models.cards.FamilyCard]
    for package in ("train", "analysis", "controls", "models"):
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            found_here = vars(importlib.import_module(module.name)).get("Config")
            todo += [found_here] if dataclasses.is_dataclass(found_here) else []
    while todo:
        if (schema := todo.pop()) not in found:
            found.add(schema)
            todo += [
                kind
                for hint in get_type_hints(schema).values()
                for kind in kinds(hint)
                if dataclasses.is_dataclass(kind)
            ]
    return found


def kinds(hint) -> list[type]:
    """The types that a hint is made of: list[Pair] | None gives Pair and NoneType."""
    return [kind for part in get_args(hint) for kind in kinds(part)] or [hint]


def test_every_number_of_a_config_and_card_has_its_range():
    names = {
        (field.name, schema.__name__)
        for schema in schemas()
        for field in dataclasses.fields(schema)
        if {int, float} & set(kinds(get_type_hints(schema)[field.name]))
    }
    assert len(schemas()) > 12 and not {(name, of) for name, of in names if name not in RANGES}
    assert not RANGES.keys() - {name for name, _ in names}, "ranges of no key"


def test_every_default_is_in_its_range():
    for schema in schemas():
        if all(
            f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
            for f in dataclasses.fields(schema)
        ):
            merge(schema)


@pytest.mark.parametrize("path", RECIPES)
def test_recipe_opens_with_what_it_makes_the_command_and_what_to_expect(path):
    makes, command, expect, *_ = (ROOT / path).read_text().splitlines()
    assert all(re.match(r"# \S", line) for line in (makes, command, expect))
    assert f"config={path}" in command


def fences(text: str) -> list[tuple[str, str, str]]:
    """(line before, language, content) of each fenced block of a Markdown text."""
    return re.findall(r"(?:^([^\n]*)\n\n?)?^```(\w*)[^\n]*\n(.*?)^```$", text, re.M | re.S)


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "docs").rglob("*.md"))),
]


def readme() -> list[tuple[str, str, str]]:
    return fences((ROOT / "README.md").read_text())


def shell_lines(blocks: list[tuple[str, str, str]]) -> list[str]:
    """The commands of the shell blocks, without prompts and comments, continuations joined."""
    text = "\n".join(content for _, language, content in blocks if language in ("bash", "sh", "console"))
    lines = [
        re.sub(r"(^|\s)#.*", "", line.removeprefix("$ ")).strip()
        for line in text.replace("\\\n", " ").splitlines()
    ]
    return [line for line in lines if line]


def missing(line: str) -> list[str]:
    """What a command names and the project lacks: modules, scripts, configs, targets of make."""
    modules = re.findall(r"python[\d.]* -m ([\w.]+)", line)
    scripts = re.findall(r"(?<![\w./-])((?:train|analysis|models|controls|tests)/[\w/.-]+\.py)\b", line)
    configs = re.findall(r"\bconfig=(\S+)", line)
    targets = [word for words in re.findall(r"\bmake((?: +[\w-]+)+)", line) for word in words.split()]
    return [
        *(f"module {name}" for name in modules if not _found(name)),
        *(f"file {name}" for name in scripts + configs if not (ROOT / name).is_file()),
        *(f"target {name}" for name in targets if name not in make_targets()),
    ]


def make_targets() -> dict[str, str]:
    """The Makefile's targets, each with the text that `make help` shows."""
    return dict(re.findall(r"^([\w-]+):.*?(?:## (.*))?$", (ROOT / "Makefile").read_text(), re.M))


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def tree_paths(tree: str) -> list[str]:
    """The paths of a file tree, indented or drawn with lines.

    What follows two spaces or the first word that is no path is prose.
    """
    paths, above = [], []  # above: (column, path) of the folders that the line may stand in
    for line in tree.splitlines():
        bare = re.sub(r"[│├└─|`]", " ", line)
        column = len(bare) - len(bare.lstrip())
        above = [(c, path) for c, path in above if c < column]
        parent = above[-1][1] if above else ""
        for word in re.split(r"\s{2,}", bare.strip())[0].split():
            name = word.rstrip(":,")
            if not re.fullmatch(r"[\w.-]+/[\w./-]*|[\w-]*\.\w+|LICENSE|Makefile", name):
                break
            path = "" if name == "distilled-control/" else parent + name
            paths += [path] if path else []
            if name.endswith("/"):
                above.append((column, path))
    return paths


def test_the_readme_has_the_two_commands_that_ci_runs():
    for name in ("run", "test"):
        (block,) = [
            content
            for before, language, content in readme()
            if before == f"<!-- ci: {name} -->" and language == "bash"
        ]
        assert block.strip()


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_docs_name_things_that_exist(page):
    lines = shell_lines(fences((ROOT / page).read_text()))
    assert lines or page not in ("README.md", "docs/guide.md", "docs/families.md")
    assert not [f"{what}: {line}" for line in lines for what in missing(line)]


def test_paths_in_the_readmes_file_tree_exist():
    (tree,) = [
        content
        for _, language, content in readme()
        if language in ("", "text") and re.search(r"^\W*configs/", content, re.M)
    ]
    paths = tree_paths(tree)
    assert len(paths) > 10
    assert not [
        path for path in paths if not path.startswith("runs/") and not (ROOT / path).exists()
    ]  # runs/ is what commands make


def test_the_checks_themselves_see_what_is_wrong():
    wrong = "python -m analysis.nothing config=configs/no.yaml && make coffee  "
    assert missing(wrong) == ["module analysis.nothing", "file configs/no.yaml", "target coffee"]
    assert missing("accelerate launch train/nothing.py steps=3") == ["file train/nothing.py"]
    assert missing(". .venv/bin/activate && python3.11 -m venv .venv && make check test") == []
    text = "say:\n```bash\n$ a \\\n  b  # why\n\n# c\n```\n<!-- x -->\n\n```text\nno\n```\n"
    assert [before for before, *_ in fences(text)] == ["say:", "<!-- x -->"]
    assert shell_lines(fences(text)) == ["a    b"]
    drawn = (
        "distilled-control/\n├── configs/      the defaults\n│   └── sliders/  a.yaml: x\n├── "
        "LICENSE\n└── .ci/run  what CI runs\n"
    )
    assert tree_paths(drawn) == ["configs/", "configs/sliders/", "LICENSE", ".ci/run"]
    plain = (
        "configs/\n    __init__.py: load\n    sliders/ loras/    short\nmodels/ the family\n    "
        "noise.py  levels\n"
    )
    assert tree_paths(plain) == [
        "configs/",
        "configs/__init__.py",
        "configs/sliders/",
        "configs/loras/",
        "models/",
        "models/noise.py",
    ]


def test_make_explains_each_target():
    targets = make_targets()
    assert {"help", "check", "test", "demo", "tiny", "report", "proof"} <= targets.keys() and all(
        targets.values()
    )


def test_links_between_the_docs_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_the_readme_can_be_read():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_python_in_the_docs_runs(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = [content for _, language, content in fences((ROOT / page).read_text()) if language == "python"]
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})


def test_the_docs_say_what_records_cards_and_commands_say():
    """`make docs` writes the blocks anew where this fails."""
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs/make.py")
    spec.loader.exec_module(make := importlib.util.module_from_spec(spec))
    assert not [path for path, text in make.pages().items() if path.read_text(encoding="utf-8") != text]


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_no_folder_holds_more_files_than_fit_in_a_head():
    folders = {path.parent for package in (*ALLOWED, "tests") for path in modules(package)}
    most = {ROOT / "analysis": 12, ROOT / "models": 25, ROOT / "train": 25}
    full = {folder: len({*folder.glob("*.py")} - {folder / "__init__.py"}) for folder in folders}
    assert not {folder: count for folder, count in full.items() if count > most.get(folder, 15)}


def test_imports_go_in_no_circle():
    files = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
        for p in ALLOWED
        for path in modules(p)
    }
    names = {name.removesuffix(".__init__"): path for name, path in files.items()}
    edges = {name: top_imports(path) & names.keys() - {name} for name, path in names.items()}
    while leaves := [name for name, needed in edges.items() if not needed & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges, "these import each other"


def top_imports(path: Path) -> set[str]:
    """The modules that running a file imports: not those within functions and `if TYPE_CHECKING`."""
    found, todo = set(), list(ast.parse(path.read_text()).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = {name for name in names if source(name)}
            found |= inner | ({node.module} if names - inner else set())
        elif isinstance(node, ast.Try | ast.With):
            todo += node.body
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            todo += node.body
    return found


def test_lines_and_functions_are_short():
    lengths, lines, lambdas = {}, 0, 0
    for path in (path for package in ALLOWED for path in modules(package)):
        text = path.read_text()
        lines += text.count("\n")
        for node in ast.walk(ast.parse(text)):
            lambdas += isinstance(node, ast.Lambda)
            if isinstance(node, ast.FunctionDef):
                lengths[f"{path.relative_to(ROOT)}:{node.name}"] = node.end_lineno - node.lineno + 1
    del lengths["models/tiny/faces.py:draw"]  # a picture, line by line
    ordered = sorted(lengths.values())
    assert ordered[int(0.9 * len(ordered))] <= 20
    assert not {name: length for name, length in lengths.items() if length > 60}
    assert not {name: n for name, n in lengths.items() if re.match(r"analysis/\w+\.py:main", name) and n > 20}
    assert 1000 * lambdas / lines <= 5
    wide = [
        path
        for package in (*ALLOWED, "tests", "docs")
        for path in modules(package)
        if max(map(len, path.read_text().splitlines()), default=0) > 110
    ]
    assert not wide
