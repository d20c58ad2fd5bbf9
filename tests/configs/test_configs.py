import dataclasses
import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import yaml

import configs
from configs import UserError, entry, load, merge, replacing, save, usage
from configs.options import FORMER
from models.cards import MemberCard
from train import slider


@dataclass
class Optim:
    rate: float = 1e-3  # learning rate
    beta: float = 0.9  # momentum


@dataclass
class Config:
    steps: int = 10  # optimizer steps
    colour: str = "#fff"  # of the background
    prompts: list[str] = field(default_factory=lambda: ["a face"])  # one image each
    optim: Optim = field(default_factory=Optim)  # the optimizer
    limit: float | None = None
    layers: dict[str, Optim] = field(default_factory=dict)  # by name


@dataclass
class Named:
    name: str  # of the run


def refusal(*layers, schema=Config) -> str:
    """The one line with which `merge` refuses."""
    with pytest.raises(UserError) as caught:
        merge(schema, *layers)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("stpes=3", "unknown key 'stpes'; did you mean 'steps'?"),
        ("--steps=3", "did you mean 'steps'?"),
        ("zzz=3", "the keys are steps, colour, prompts, optim, limit, layers"),
        ("optim.raet=3", "unknown key 'optim.raet'; did you mean 'optim.rate'?"),
        ("layers.mid.raet=3", "did you mean 'layers.mid.rate'?"),
        ("=3", "unknown key ''"),
        ("steps=many", "steps=many: Value 'many' of type 'str' could not be converted to Integer"),
        ("steps=null", "steps=null: "),
        ("optim=3", "optim=3: "),
        ("optim.rate.x=3", "optim.rate"),
        ("prompts=[a, b", "not valid YAML at line"),
        ("prompts=a", "prompts=a: "),
        ("prompts.0=a", "a list is given whole"),
        ("colour='", "not valid YAML at line 1"),
        ("colour=${nope}", "'nope' not found"),
        ("colour=${", "colour=${: "),
        ("colour=${oc.env:NO_SUCH_VARIABLE}", "NO_SUCH_VARIABLE"),
    ],
)
def test_a_bad_word_is_one_helpful_line(word, expected):
    assert expected in refusal([word])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stpes: 3", "did you mean 'steps'?"),
        ("optim:\n  raet: 1", "did you mean 'optim.rate'?"),
        ("steps: [1", "not valid YAML at line"),
        ("steps: 1\nsteps: 2", "duplicate key steps"),
        ("steps: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("- 1", "key: value pairs"),
        ("7", "key: value pairs"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, text, expected):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    line = refusal(path)
    assert expected in line and line.startswith(str(path))


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x80")
    assert "not a text file" in refusal(tmp_path / "bad.yaml")


def test_a_missing_file_and_a_missing_value():
    assert "no config file at nowhere.yaml" in refusal("nowhere.yaml")
    assert "name" in refusal([], schema=Named)


def test_precedence_is_dataclass_then_files_then_words(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 20\noptim: {rate: 0.5}\nlimit: 1")
    (tmp_path / "b.yaml").write_text("limit: 2")
    config = load(
        Config,
        [
            "steps=30",
            f"config={tmp_path}/a.yaml",
            f"config={tmp_path}/b.yaml",
            "prompts=[x, y]",
            "layers.mid.beta=0",
        ],
    )
    assert config == Config(
        steps=30, prompts=["x", "y"], optim=Optim(rate=0.5), limit=2.0, layers={"mid": Optim(beta=0.0)}
    )
    assert merge(Config) == Config()


SIGNS = [
    "a face #2",
    "a: b",
    "[x",
    "{",
    "null",
    "*x",
    "&x",
    "!x",
    "- a",
    "%",
    "@home",
    "`",
    "?",
    "|",
    "~",
]  # YAML's own, in a file
TYPED = [
    "on",
    "no",
    "true",
    "0123",
    "1e3",
    "1_000",
    "1:30",
    "0x1F",
    ".inf",
    "2024-01-01",
    "=",
    "<<",
    "it's",
    "ä, ö",
    "a  b",
]


@pytest.mark.parametrize("typed", [*TYPED, *SIGNS])
def test_a_text_stays_as_it_was_typed(typed, tmp_path):
    assert merge(Config, [f"colour={typed}"]).colour == typed
    if typed in TYPED:
        (tmp_path / "c.yaml").write_text(f"colour: {typed}\nprompts: [{typed}, no, 0123]\n", encoding="utf-8")
        found = merge(Config, tmp_path / "c.yaml")
        assert (found.colour, found.prompts[-2:]) == (typed, ["no", "0123"])
        assert merge(Config, [f"prompts=[{typed}, off]"]).prompts[-1] == "off"


@pytest.mark.parametrize(
    ("word", "key", "expected"),
    [
        ("colour=", "colour", ""),
        ("colour= a ", "colour", "a"),
        ("colour='a: b'", "colour", "a: b"),
        ('colour="on"', "colour", "on"),
        ("limit=", "limit", None),
        ("limit=null", "limit", None),
        ("limit=1e3", "limit", 1000.0),
        ("steps=1_000", "steps", 1000),
        ("steps=0100", "steps", 100),
        ("optim.rate=1e-4", "optim", Optim(rate=1e-4)),
        ("layers.on.rate=2", "layers", {"on": Optim(rate=2.0)}),
    ],
)
def test_a_word_is_read_as_its_field_says(word, key, expected):
    assert getattr(merge(Config, [word]), key) == expected


OTHER = [
    "steps=1:30",
    "steps=on",
    "steps=2.5",
    "steps=1e3",
    "steps=",
    "steps=2024-01-01",
    f"steps={'9' * 5000}",
    "optim.rate=on",
    "optim.rate=.nan",
    "optim.rate=.inf",
    "limit=yes",
    "a.b.c=",
    "größe=3",
    "optim..rate=3",
    "[=3",
    "prompts=",
    "prompts={a: b}",
    "layers=[a]",
]


@pytest.mark.parametrize("word", OTHER)
def test_a_value_of_another_kind_is_refused(word):
    refusal([word])


LAUGHS = "a: &a [x]\n" + "".join(
    f"{n}: &{n} [{', '.join([f'*{m}'] * 10)}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompts: &a [*a]", "nests too deep, or refers to itself"),
        (LAUGHS, "values"),
        ("steps: " + "[" * 100_000, "nest"),
        ("- target: a\n  positive: b", "a list goes to its own key: optims="),
    ],
)
def test_a_file_that_would_fill_the_memory_or_belongs_elsewhere(tmp_path, text, expected):
    @dataclass
    class Rows(Config):
        optims: list[Optim] = field(default_factory=list)

    (tmp_path / "c.yaml").write_text(text)
    assert expected in refusal(tmp_path / "c.yaml", schema=Rows)


def test_a_list_may_stand_in_a_file(tmp_path):
    @dataclass
    class Rows:
        optims: list[Optim] = field(default_factory=list)
        names: list[str] = field(default_factory=list)

    (tmp_path / "rows.yaml").write_text("- rate: 1e-3\n- {rate: 2, beta: 0}\n")
    (tmp_path / "names.yaml").write_text("- on\n- 0123\n")
    found = merge(Rows, [f"optims={tmp_path}/rows.yaml", f"names={tmp_path}/names.yaml"])
    assert found == Rows([Optim(1e-3), Optim(2.0, 0.0)], ["on", "0123"])
    assert "no config file" in refusal([f"optims={tmp_path}/none.yaml"], schema=Rows)


def test_a_folder_a_huge_file_and_a_bom_as_config(tmp_path, monkeypatch):
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfsteps: 3\r\n")
    assert merge(Config, tmp_path / "bom.yaml").steps == 3
    assert "is a folder" in refusal(tmp_path)
    assert "is a folder" in refusal("")
    assert "no config file" in refusal("x" * 200)
    refusal("x" * 5000)
    monkeypatch.setattr("configs.options.MOST_BYTES", 4)
    assert "larger than" in refusal(tmp_path / "bom.yaml")


def test_a_config_refuses_by_itself():
    @dataclass
    class Even:
        steps: int = 2

        def __post_init__(self):
            if self.steps % 2:
                raise ValueError("steps must be even")

    assert refusal(["steps=3"], schema=Even) == "steps must be even"


def test_a_word_without_equals_sign():
    with pytest.raises(UserError, match="'steps' is not of the form key=value"):
        load(Config, ["steps"])


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_lists_every_key_with_comment_and_default(capsys, word):
    with pytest.raises(SystemExit) as caught:
        load(Config, ["steps=3", word])
    assert caught.value.code == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    expected = [
        "steps optimizer steps [10]",
        "colour of the background [#fff]",
        'prompts one image each [["a face"]]',
        "optim the optimizer",
        "optim.rate learning rate [0.001]",
        "optim.beta momentum [0.9]",
        "limit [null]",
        "layers by name [{}]",
    ]
    assert shown[-len(expected) :] == expected


def test_help_of_a_key_without_default_and_of_an_inherited_one_which_comes_last():
    @dataclass
    class Longer(Named):
        size: int = 1  # in pixels

    shown = [" ".join(line.split()) for line in usage(Longer).splitlines()]
    assert shown[-2:] == ["size in pixels [1]", "name of the run [required]"]


def test_help_shows_each_mapping_of_a_list_on_a_line():
    @dataclass
    class Rows:
        optims: list[Optim] = field(default_factory=lambda: [Optim(), Optim(rate=1.0)])  # several

    shown = [" ".join(line.split()) for line in usage(Rows).splitlines()]
    assert shown[-3:] == [
        "optims several [[",
        '{"rate": 0.001, "beta": 0.9},',
        '{"rate": 1.0, "beta": 0.9}]]',
    ]


def test_save_writes_the_whole_config_with_versions_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", [str(configs.ROOT / "analysis/transfer.py"), "prompts=[a face, b]", "colour=two\nlines"]
    )
    config = Config(steps=3, prompts=["ein Lächeln"])
    save(config, tmp_path / "new/config.yaml")
    lines = (tmp_path / "new/config.yaml").read_text().splitlines()
    assert lines[0] == "# python -m analysis.transfer 'prompts=[a face, b]' 'colour=two"
    assert any(line.startswith("# torch 2.") for line in lines)
    assert set(yaml.safe_load("\n".join(lines))) == set(Config.__dataclass_fields__)
    assert merge(Config, tmp_path / "new/config.yaml") == config


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("train/slider.py", "train/slider.py"),
        ("/opt/venv/bin/pytest", "pytest"),
        (str(configs.ROOT / "train/lora.py"), "train/lora.py"),
    ],
)
def test_command_shows_no_absolute_path_of_the_program(monkeypatch, program, expected):
    monkeypatch.setattr(sys, "argv", [program, "steps=3"])
    assert configs.command() == f"python {expected} steps=3"


def test_versions_need_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "torch" in configs.versions() and "commit" not in configs.versions()


def test_replacing_takes_the_place_when_all_went_well(tmp_path):
    path = tmp_path / "deep/results.json"
    with replacing(path) as new:
        assert new.suffix == path.suffix and not path.exists()
        new.write_text(json.dumps([1]))
    assert json.loads(path.read_text()) == [1]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_replacing_leaves_the_old_file_on_an_exception(tmp_path, error):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as new:
        new.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("former", "now"), FORMER.items())
def test_a_former_key_says_what_it_is_called_now(former, now):
    known = {field.name for schema in (slider.Config, MemberCard) for field in dataclasses.fields(schema)}
    for key in now.split():
        assert key in known and former not in known
        schema = (
            slider.Config
            if key in {field.name for field in dataclasses.fields(slider.Config)}
            else MemberCard
        )
        with pytest.raises(UserError, match=f"unknown key '{former}'; did you mean '{key}'"):
            merge(schema, [f"{former}=1"])


def test_two_dashes_are_a_key_that_is_true():
    assert load(slider.Config, ["--dry-run", "--overwrite"]).dry_run


def test_entry_turns_a_user_error_into_one_line_and_exit_code_2(capsys):
    def main():
        raise UserError("no such thing\nat all")

    with pytest.raises(SystemExit) as caught:
        entry(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: no such thing at all\n"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (UserError("a" * 10_000 + " give steps=3"), "give steps=3"),
        (UserError("\x1b[31mred\x07 \u202e"), "[31mred"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), "x.txt: No such file or directory"),
        (PermissionError(13, "Permission denied", "p" * 5000), "Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("the Hub does not answer"), "the Hub does not answer"),
    ],
)
def test_entry_is_never_longer_than_a_screen_and_knows_the_systems_errors(capsys, error, says):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        entry(main)
    said = capsys.readouterr().err
    assert (
        caught.value.code == 2 and says in said and len(said) < 620 and said.removesuffix("\n").isprintable()
    )


def test_entry_lets_a_bug_through_and_an_interrupt_end_quietly(capsys):
    def bug():
        raise KeyError("ours")

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyError):
        entry(bug)
    with pytest.raises(SystemExit) as caught:
        entry(interrupted)
    assert caught.value.code == 130
    assert "continues" in capsys.readouterr().err


def test_a_command_as_the_shell_sees_it(tmp_path):
    script = tmp_path / "draw.py"
    script.write_text(
        "'''Draws.'''\nfrom dataclasses import dataclass\nfrom configs import entry, "
        "load\n\n\n@dataclass\nclass Config:\n"
        "    steps: int = 1  # strokes\n\n\nentry(lambda: print(load(Config).steps))\n"
    )

    def run(*words):
        code = [sys.executable, str(script), *words]
        return subprocess.run(
            code, capture_output=True, text=True, cwd=configs.ROOT, env={"PYTHONPATH": str(configs.ROOT)}
        )

    bad = run("step=2")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
    shown = run("--help").stdout
    assert shown.startswith("Draws.") and "strokes" in shown
    assert run("steps=2").stdout == "2\n"


def test_what_libraries_say_that_nobody_can_mend_is_not_said():
    """bitsandbytes warns at its import, which diffusers makes, of a kernel that it does without."""
    name = "bitsandbytes.backends.cpu.ops"
    code = (
        f"import configs, logging; log = logging.getLogger('{name}'); log.warning('no kernel'); "
        f"log.error('broken')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=configs.ROOT)
    assert done.stderr == "broken\n"
    said = "The `local_dir_use_symlinks` argument is deprecated"
    code = f"import configs, warnings; warnings.warn({said!r}); warnings.warn('ours')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=configs.ROOT)
    assert "ours" in done.stderr and said not in done.stderr


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            "[a man, smiling]",
            "'a man' | 'smiling'; a comma inside a text needs quotes: words=[\"a man, smiling\"]",
        ),
        ("[a man, 35, a cat, a dog]", "holds 4 texts, 'a man' | '35' | 'a cat' …"),
        ("[a man,smiling]", ""),
        ("[base, dmd]", ""),
        ('["a man, smiling"]', ""),
        ('["a man", "a cat"]', ""),
        ("[]", ""),
        ("[a, b c", None),
    ],
)
def test_a_comma_outside_of_quotes_is_said(capsys, value, said):
    @dataclass
    class Texts:
        words: list[str] = field(default_factory=list)

    with nullcontext() if said is not None else pytest.raises(UserError):
        load(Texts, [f"words={value}"])
    out = capsys.readouterr().out
    assert said in out if said else not out
