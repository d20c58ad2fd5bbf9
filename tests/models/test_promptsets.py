"""Prompt sets from every kind of source, and what is wrong with them in one line."""

from pathlib import Path

import pytest

from analysis.images.quality import cycled
from configs import UserError
from models.promptsets import PromptSet, read

COCO = """case_number,prompt,evaluation_seed,coco_id
2,"A dog, asleep
on a mat.",99,7
1,A cat on a chair.,4,5
"""


def test_texts_stay_texts():
    assert read(["a cat", "a dog. really"]) == PromptSet(["a cat", "a dog. really"])


def test_a_text_is_a_text_whatever_lies_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a cat").write_text("")
    (tmp_path / "a dog").mkdir()
    (tmp_path / "a:1.csv").write_text("prompt\na bird\n")
    assert read(["a cat", "a dog", "a:1.csv", "a:1.csv:1"]).texts == ["a cat", "a dog", "a bird", "a bird"]


def test_coco_as_published(tmp_path):
    (tmp_path / "coco.csv").write_text(COCO)
    assert read([str(tmp_path / "coco.csv")]) == PromptSet(
        ["A cat on a chair.", "A dog, asleep\non a mat."], [4, 99], [1, 2]
    )
    assert read([str(tmp_path / "coco.csv"), "a bird"]).seeds is None  # which has none


def test_every_image_has_its_seed(tmp_path):
    (tmp_path / "coco.csv").write_text(COCO)
    assert read([f"{tmp_path}/coco.csv"]).numbers(2, 1000) == [4, 5, 99, 100]
    assert read(["a cat", "a dog"]).numbers(2, 1000) == [1000, 1001, 1002, 1003]
    assert read([f"{tmp_path}/coco.csv:1"]) == PromptSet(["A cat on a chair."], [4], [1])
    texts = ["A cat on a chair.", "A dog, asleep\non a mat.", "A cat on a chair."]
    assert cycled(read([f"{tmp_path}/coco.csv"]), 3) == PromptSet(texts, [4, 99, 5])


def test_a_text_file_and_a_dataset(tmp_path):
    (tmp_path / "lines.txt").write_text("a cat\n\n  a dog \n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.csv").write_text("caption,style\na bird,ink\n")
    found = read([str(tmp_path / "lines.txt"), f"hub:{tmp_path}/data", f"hub:{tmp_path}/data:train:style"])
    assert found == PromptSet(["a cat", "a dog", "a bird", "ink"])


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("a.csv", "Prompt;evaluation_seed\nein Mädchen, lächelnd;5\na cat;41337.0\n;\n\n", "utf-8"),
        ("a.csv", "evaluation_seed|prompt\n5|ein Mädchen, lächelnd\n41337|a cat\n", "utf-8-sig"),
        ("a.csv", 'prompt\tevaluation_seed\r"ein Mädchen, lächelnd"\t5\ra cat\t41337\r', "utf-16"),
        ("a.tsv", "prompt\tevaluation_seed\r\nein Mädchen, lächelnd\t5\r\na cat\t41337\r\n", "utf-16"),
        (
            "Namen = [a], ü.CSV",
            'case_number,evaluation_seed,"prompt"\n2,41337,a cat\n1.0,5,"ein Mädchen, lächelnd"\n',
            "utf-8",
        ),
        (
            "a.jsonl",
            '{"prompt": "ein Mädchen, lächelnd", "evaluation_seed": 5}\n\n{"prompt": "a cat", '
            '"evaluation_seed": 41337.0}',
            "utf-8",
        ),
    ],
)
def test_a_table_is_the_same_in_other_spellings(tmp_path, name, text, encoding):
    (tmp_path / name).write_bytes(text.encode(encoding))
    found = read([str(tmp_path / name)])
    assert found.texts == ["ein Mädchen, lächelnd", "a cat"] and found.seeds == [5, 41337]
    assert found.cases == ([1, 2] if "case_number" in text else None)


def test_seeds_that_are_not_used_are_said(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("prompt,evaluation_seed\na cat,5\na dog,\n")
    assert read([str(tmp_path / "a.csv")]).seeds is None
    assert "1 of 2 prompts have no evaluation_seed, such as 'a dog'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "words\nx\n", "has no column prompt, text, caption; it has words"),
        ("a.csv", "prompt,evaluation_seed\nx,seven\n", "line 2: evaluation_seed must be a whole number"),
        (
            "a.csv",
            f"prompt,evaluation_seed\nx,{2**64}\n",
            "line 2: evaluation_seed must be a whole number from 0",
        ),
        ("a.csv", "prompt,evaluation_seed\nx,41337.5\n", "line 2: evaluation_seed must be a whole number"),
        ("a.csv", "prompt,case_number\nx,1\ny,two\n", "line 3: case_number must be a whole number"),
        ("a.csv", "prompt,case_number\nx,1\ny,\n", "line 3: no case_number"),
        ("a.csv", "prompt,evaluation_seed\nx,1\n,2\n", "line 3: no prompt"),
        ("a.csv", "prompt\na cat\na man, smiling\n", "line 3: 2 cells under 1 columns; .* needs quotes"),
        ("a.csv", "prompt,prompt\nx,y\n", "has the column 'prompt' twice"),
        ("a.csv", 'prompt\n"a cat\na dog\n', "line 2: .*quotation mark"),
        ("a.csv", f"prompt\n{'x' * 200_000}\n", "line 2: field larger"),
        ("a.csv", f"prompt\n{'x' * 100_000}\n", "a text of 100,000 characters"),
        ("a.csv", "prompt\n", "holds no prompts"),
        ("a.csv", "prompt\na\0b\n", "holds NUL characters"),
        ("a.csv", "prompt\na m\udce4dchen\n", "line 2: not a text in UTF-8"),
        ("a.txt", "\n", "holds no prompts"),
        ("a.txt", "a\n\nm\udce4dchen", "line 3: not a text in UTF-8"),
        ("a.jsonl", '{"prompt": "x"}\n["y"]\n', "line 2: not a JSON object"),
        ("a.jsonl", '{"prompt": ["x"]}\n', "line 1: a text is needed"),
        ("a.json", '["x"]', "is no prompt file: .csv"),
        ("gone.txt", None, "no prompt file at"),
    ],
)
def test_what_is_wrong(tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=says) as error:
        read([str(tmp_path / name)])
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([], "there are no prompts"),
        (["a cat", " "], "a prompt is empty"),
        (["a/prompts.json"], "is no prompt file"),
        ([__file__], "is no prompt file"),
        ([str(Path(__file__).parent)], "is no prompt file"),
        (["a.csv:0"], "how many"),
        (["a.csv:-1"], "how many"),
        (["a.csv:ten"], "how many"),
        (["a.csv:" + "9" * 5000], "how many"),
        (["a\0b"], "is none"),
        (["a\ud800b"], "is none"),
        (["x" * 100_000], "100,000 characters"),
    ],
)
def test_prompts_that_are_none(prompts, says):
    with pytest.raises(UserError, match=says) as error:
        read(prompts)
    assert len(str(error.value).encode()) < 500


def test_a_dataset_that_is_not_there():
    with pytest.raises(UserError, match="cannot load the dataset nobody/nothing"):
        read(["hub:nobody/nothing"])
