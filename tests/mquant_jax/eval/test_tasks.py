"""Published data files are read into questions, and answers get the published scores."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from mquant_jax.errors import UserError
from mquant_jax.eval.question import Question
from mquant_jax.eval.record import hashes
from mquant_jax.eval.scoring import once, table_of
from mquant_jax.eval.tasks import TASKS, questions_of
from mquant_jax.samples import Sample
from tests.helpers import fails


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), shade, np.uint8)).save(out, "PNG")
    return out.getvalue()


def b64(shade: int) -> str:
    return base64.b64encode(png(shade)).decode()


def write_tsv(path, names, *rows):
    lines = ["\t".join(names)] + ["\t".join(map(str, row)) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def scored(name, cases):
    """Score and details of ``(question fields, answer)`` pairs."""
    task = TASKS[name]
    questions = [
        Question(str(i), Sample((), ""), **({"group": str(i)} | q))
        for i, (q, _) in enumerate(cases)
    ]
    judged = [task.judge(a, q) for q, (_, a) in zip(questions, cases, strict=True)]
    table = table_of(judged, questions)
    return task.score(table, once(table)), task.details(table)


def test_tsv_with_references_lists_and_options(tmp_path) -> None:
    names = ("index", "image", "question", "hint", "A", "B", "C", "answer", "category")
    path = write_tsv(
        tmp_path / "MMBench.tsv", names,
        (1, b64(1), "Which?", "Look.", "cat", "dog", "", "B", "animals"),
        (1000001, 1, "Which?", "nan", "dog", "cat", "", "A", "animals"),
        (2, f"['{b64(2)}', '{b64(3)}']", "Größe?", "", "klein", "groß", "nan", "A", "size"),
    )  # fmt: skip
    first, second, third = questions_of(TASKS["mmbench"], path)
    assert first.sample.question == (
        "Look.\nWhich?\nA. cat\nB. dog\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert first.sample.images[0] is second.sample.images[0] == png(1)
    assert (
        second.sample.question.startswith("Which?\nA. dog") and second.group == first.group == "1"
    )
    assert third.sample.images == (png(2), png(3)) and third.choices == {"A": "klein", "B": "groß"}
    assert third.answers == ("A",) and third.category == "size"
    assert first.sample.where == f"{path}:2"
    assert len(questions_of(TASKS["mmbench"], path, 2)) == 2


def test_rows_without_an_index_keep_their_pictures(tmp_path) -> None:
    path = write_tsv(tmp_path / "t.tsv", ("image", "question", "answer"),
                     (b64(1), "q", "a"), (b64(2), "q", "a"))  # fmt: skip
    one, two = questions_of(TASKS["docvqa"], path)
    assert (one.sample.images, two.sample.images) == ((png(1),), (png(2),))


def test_tsv_with_picture_files_and_many_answers(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(png(9))
    path = write_tsv(
        tmp_path / "t.tsv", ("index", "image_path", "question", "answer"),
        (0, "a.png", "read", "\"['one', 'two']\""), (0, "a.png", "again", "plain"),
    )  # fmt: skip
    one, two = questions_of(TASKS["docvqa"], path)
    assert one.answers == ("one", "two") and two.answers == ("plain",)
    assert one.sample.images == (tmp_path / "a.png",) and [one.id, two.id] == ["0", "0#1"]


def test_bad_files_are_named(tmp_path) -> None:
    names = ("index", "image", "question", "answer")
    task = TASKS["textvqa"]
    for rows, word in (
        ([(1, "7", "q", "a")], "t.tsv:2: image '7': expected base64, or the index"),
        ([(1, "x" * 80 + "!", "q", "a")], "t.tsv:2: image .*not base64"),
        ([(1, b64(1), "q", "")], "t.tsv:2: no answer; expected one of the columns"),
        ([(1, b64(1), "q", "a", "more")], "5 cells in 4 columns"),
        ([], "no questions"),
    ):
        path = write_tsv(tmp_path / "t.tsv", names, *rows)
        fails(word, lambda path=path: questions_of(task, path))
    (tmp_path / "l.tsv").write_bytes("index\timage\tquestion\n1\t\tä".encode("latin-1"))
    fails("l.tsv: not UTF-8", lambda: questions_of(task, tmp_path / "l.tsv"))
    fails("none.tsv: no such file", lambda: questions_of(task, tmp_path / "none.tsv"))
    fails("expected a file named .tsv, .parquet, .jsonl",
          lambda: questions_of(task, tmp_path / "x.csv"))  # fmt: skip
    fails("needs --data FILE", lambda: questions_of(task, None))
    (tmp_path / "p.parquet").write_bytes(b"PAR1 no PAR1")
    fails("p.parquet: (cannot be read as parquet|parquet needs pyarrow)",
          lambda: questions_of(task, tmp_path / "p.parquet"))  # fmt: skip
    path = write_tsv(tmp_path / "o.tsv", (*names, "A", "B"), (1, b64(1), "q", "C", "x", "y"))
    fails(
        "the answer 'C' is not among the options A, B", lambda: questions_of(TASKS["mmstar"], path)
    )


def test_parquet_with_structs(tmp_path) -> None:
    pa = pytest.importorskip("pyarrow", reason="the extra eval is not installed")
    import pyarrow.parquet as parquet

    def write(name, rows):
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name)
        return tmp_path / name

    image = {"bytes": png(5), "path": None}
    path = write("s.parquet", [
        {"image": image, "question": "q", "choices": ["yes", "no"], "answer": 1, "hint": "h"},
        {"image": None, "question": "r", "choices": ["1", "0"], "answer": 0, "hint": ""},
    ])  # fmt: skip
    one, two = questions_of(TASKS["scienceqa"], path)
    assert (
        one.answers == ("B",)
        and one.sample.images == (png(5),)
        and one.sample.question[:2] == "h\n"
    )
    assert two.answers == ("A",) and two.sample.images == () and two.id == "1"
    path = write("m.parquet", [{
        "id": "validation_Art_Theory_7", "question": "Is <image 2> like <image 1>?",
        "options": "['no', 'as <image 1>']", "answer": "A", "question_type": "multiple-choice",
        "image_1": image, "image_2": {"bytes": png(6), "path": "x.png"}, "image_3": image,
    }])  # fmt: skip
    (q,) = questions_of(TASKS["mmmu"], path)
    assert q.category == "Art_Theory" and q.sample.images == (png(5), png(6), png(5), png(5))
    kinds = [p.get("text", "IMAGE") for p in q.sample.messages[0]["content"]]
    assert kinds[:5] == ["IMAGE", "Is ", "IMAGE", " like ", "IMAGE"] and kinds[6] == "IMAGE"


def test_jsonl_of_pope(tmp_path) -> None:
    (tmp_path / "a.jpg").write_bytes(png(1))
    row = {"question_id": 3, "image": "a.jpg", "text": "Is there a dog?", "label": "no"}
    path = tmp_path / "pope.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (q,) = questions_of(TASKS["pope"], path)
    assert (q.id, q.answers, q.sample.images) == ("3", ("no",), (tmp_path / "a.jpg",))
    path.write_text('{"question": "q"}\n', encoding="utf-8")
    fails("pope.jsonl:1: no answer", lambda: questions_of(TASKS["pope"], path))


def test_easyvqa_and_text(tmp_path) -> None:
    path = tmp_path / "questions.json"
    path.write_text('[["what color?", "red", 12], ["is it a circle?", "no", 3]]', encoding="utf-8")
    one, two = questions_of(TASKS["easyvqa"], path)
    assert one.sample.images == (tmp_path / "images" / "12.png",) and two.answers == ("no",)
    path.write_text('[["what color?", "red"]]', encoding="utf-8")
    fails("row 0: expected", lambda: questions_of(TASKS["easyvqa"], path))
    (tmp_path / "t.txt").write_text(" \n", encoding="utf-8")
    fails(": no text", lambda: questions_of(TASKS["perplexity"], tmp_path / "t.txt"))


def test_mme_sums_accuracy_and_accuracy_plus() -> None:
    def asked(category, picture, truth):
        return {"category": category, "group": f"{category}/{picture}", "answers": (truth,)}

    score, details = scored("mme", [
        (asked("color", 1, "Yes"), "Yes"), (asked("color", 1, "No"), "no."),
        (asked("color", 2, "Yes"), "yes"), (asked("color", 2, "No"), "Yes"),
        (asked("code_reasoning", 1, "Yes"), "Maybe"), (asked("code_reasoning", 1, "No"), "No"),
    ])  # fmt: skip
    assert details["acc/color"] == 75 and details["acc_plus/color"] == 50
    assert (details["perception"], details["cognition"]) == (125, 50) and score == 175


def test_pope_counts_yes() -> None:
    cases = [
        ("yes", "Yes"),
        ("yes", "No"),
        ("no", "Yes, it is"),
        ("no", "no"),
        ("no", "There is not"),
    ]
    score, details = scored("pope", [({"answers": (t,)}, a) for t, a in cases])
    assert details["precision"] == details["recall"] == details["f1"] == score == 50
    assert details["accuracy"] == 60 and details["yes_ratio"] == 40
    assert scored("pope", [({"answers": ("yes",)}, "no")])[0] == 0


def test_mmbench_needs_all_rotations() -> None:
    two = {"A": "cat", "B": "dog"}
    rows = [("1", "A", "A"), ("1", "B", "B"), ("2", "A", "A"), ("2", "B", "A"), ("3", "A", "")]
    score, details = scored("mmbench", [
        ({"group": g, "answers": (t,), "choices": two}, a) for g, t, a in rows
    ])  # fmt: skip
    assert score == pytest.approx(100 / 3) and details["accuracy"] == 60


def test_ocrbench_is_of_a_thousand() -> None:
    formula = "Handwritten Mathematical Expression Recognition"
    score, details = scored("ocrbench", [
        ({"category": "Regular Text Recognition", "answers": ("CENTRE",)}, "the word centre"),
        ({"category": "Digit String Recognition", "answers": ("12",)}, "1 2"),
        ({"category": "Handwriting Recognition", "answers": ("at",)}, "cat"),
        ({"category": formula, "answers": ("x + 1",)}, "$x+1$"),
        ({"category": formula, "answers": ("X",)}, "x"),
        ({"category": formula, "answers": ("X",)}, ""),
    ])  # fmt: skip
    assert score == 500 and details[f"category/{formula}"] == 1
    assert details["text_recognition"] == 2 and details["category/Digit String Recognition"] == 0


@pytest.mark.parametrize(
    ("name", "question", "answer", "wanted"),
    [
        ("textvqa", {"answers": ("cat",) * 10}, "Cat", 100),
        ("textvqa", {"answers": ("cat",)}, "the cat", 100),
        ("docvqa", {"answers": ("abcd", "x")}, "abce", 75),
        ("infovqa", {"answers": ("50%",)}, "50 %", 75),
        ("chartqa", {"answers": ("100",)}, "96", 100),
        ("mmmu", {"answers": ("B",), "choices": {"A": "x", "B": "y"}}, "(B)", 100),
        ("mmmu", {"answers": ("3.14",)}, "It is 3.14", 100),
        ("mmmu", {"answers": ("B",), "choices": {"A": "x", "B": "y"}}, "", 0),
        ("mmstar", {"answers": ("B",), "choices": {"A": "x", "B": "yes"}}, "Yes", 100),
        ("ai2d", {"answers": ("A",), "choices": {"A": "1", "B": "2"}}, "1", 100),
        ("realworldqa", {"answers": ("3",)}, "3.", 100),
        ("easyvqa", {"answers": ("red",)}, "Red", 100),
        ("demo", {"answers": ("red",)}, "Red", 0),
    ],
)
def test_one_answer(name, question, answer, wanted) -> None:
    assert scored(name, [(question, answer)])[0] == pytest.approx(wanted)


def test_tasks_are_named_once() -> None:
    assert all(name == task.name and task.unit and task.title for name, task in TASKS.items())
    assert {n for n, t in TASKS.items() if t.judge is None} == {"perplexity"}
    with pytest.raises(UserError, match="task is 'nope'; expected one of demo, jsonl"):
        from mquant_jax.eval.tasks import find_task

        find_task("nope")


def shard(path, question, split=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"question": question, "answer": "a"} | ({"split": split} if split else {})
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def asked(path, split=None):
    return [q.sample.question[:1] for q in questions_of(TASKS["docvqa"], path, split=split)]


def test_shards_and_splits_by_file_name(tmp_path) -> None:
    for name, question in (("validation-00001-of-00002", "b"), ("test-00000-of-00001", "t"),
                           ("validation-00000-of-00002-0123abcd", "a")):  # fmt: skip
        shard(tmp_path / "data" / f"{name}.jsonl", question)
    assert asked(tmp_path, "validation") == ["a", "b"] and asked(tmp_path / "data", "test") == ["t"]
    assert asked(tmp_path / "data" / "val*.jsonl") == ["a", "b"]
    assert asked(tmp_path / "**" / "test-*.jsonl") == ["t"]
    fails("the splits test, validation; choose one with --split", lambda: asked(tmp_path))
    fails("no split 'dev'; found test, validation", lambda: asked(tmp_path, "dev"))
    (tmp_path / "data" / "validation-00001-of-00002.jsonl").unlink()
    fails("of the 2 shards of validation, these are missing: 1", lambda: asked(
        tmp_path, "validation"))  # fmt: skip
    shard(tmp_path / "x.tsv", "q")
    fails("files of several kinds .*jsonl, .tsv", lambda: asked(tmp_path))
    fails("no file matches the pattern", lambda: asked(tmp_path / "*.parquet"))
    (tmp_path / "empty").mkdir()
    fails("has no file named", lambda: asked(tmp_path / "empty"))


def test_splits_by_column(tmp_path) -> None:
    path = tmp_path / "all.jsonl"
    for question, split in (("a", "dev"), ("b", "validation"), ("c", "dev")):
        shard(path, question, split)
    assert asked(path) == ["a", "b", "c"] and asked(path, "dev") == ["a", "c"]
    fails("no split 'test'; found dev, validation", lambda: asked(path, "test"))
    shard(tmp_path / "plain.jsonl", "a")
    fails("no split 'test'; found none", lambda: asked(tmp_path / "plain.jsonl", "test"))
    fails("data of task jsonl have no splits", lambda: questions_of(
        TASKS["jsonl"], path, split="test"))  # fmt: skip


def test_the_record_names_every_shard(tmp_path) -> None:
    for name in ("art/test-00000-of-00001", "law/test-00000-of-00001"):
        shard(tmp_path / f"{name}.jsonl", name)
    assert list(hashes(tmp_path, None)) == [
        "art/test-00000-of-00001.jsonl", "law/test-00000-of-00001.jsonl"
    ]  # fmt: skip
    assert list(hashes(tmp_path / "law" / "test-00000-of-00001.jsonl", "test")) == [
        "test-00000-of-00001.jsonl"
    ]
