"""Prompt sets from every kind of source, and what is wrong with them in one line."""

import pytest

from analysis.quality import cycled
from configs import UserError
from models.promptsets import PromptSet, read

COCO = """case_number,prompt,evaluation_seed,coco_id
2,"A dog, asleep
on a mat.",99,7
1,A cat on a chair.,4,5
"""


def test_texts_stay_texts():
    assert read(["a cat", "a dog. really"]) == PromptSet(["a cat", "a dog. really"]) and read([]) == PromptSet([])


def test_coco_as_published(tmp_path):
    (tmp_path / "coco.csv").write_text(COCO)
    assert read([str(tmp_path / "coco.csv")]) == PromptSet(["A cat on a chair.", "A dog, asleep\non a mat."], [4, 99])
    assert read([str(tmp_path / "coco.csv"), "a bird"]).seeds is None  # which has none


def test_every_image_has_its_seed(tmp_path):
    (tmp_path / "coco.csv").write_text(COCO)
    assert read([f"{tmp_path}/coco.csv"]).numbers(2, 1000) == [4, 5, 99, 100]
    assert read(["a cat", "a dog"]).numbers(2, 1000) == [1000, 1001, 1002, 1003]
    assert read([f"{tmp_path}/coco.csv:1"]) == PromptSet(["A cat on a chair."], [4])
    texts = ["A cat on a chair.", "A dog, asleep\non a mat.", "A cat on a chair."]
    assert cycled(read([f"{tmp_path}/coco.csv"]), 3) == PromptSet(texts, [4, 99, 5])


def test_a_text_file_and_a_dataset(tmp_path):
    (tmp_path / "lines.txt").write_text("a cat\n\n  a dog \n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.csv").write_text("caption,style\na bird,ink\n")
    found = read([str(tmp_path / "lines.txt"), f"hub:{tmp_path}/data", f"hub:{tmp_path}/data:train:style"])
    assert found == PromptSet(["a cat", "a dog", "a bird", "ink"])


@pytest.mark.parametrize(("name", "text", "says"), [
    ("a.csv", "words\nx\n", "has no column prompt, text, caption; it has words"),
    ("a.csv", "prompt,evaluation_seed\nx,seven\n", "must be whole numbers"),
    ("a.csv", "prompt\n", "holds no prompts"),
    ("a.txt", "\n", "holds no prompts"),
    ("gone.txt", None, "no prompt file at"),
])  # fmt: skip
def test_what_is_wrong(tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says) as error:
        read([str(tmp_path / name)])
    assert "\n" not in str(error.value)


def test_a_dataset_that_is_not_there():
    with pytest.raises(UserError, match="cannot load the dataset nobody/nothing"):
        read(["hub:nobody/nothing"])
