"""The JSONL format of calibration and evaluation data."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mquant_jax as mq
from mquant_jax.errors import UserError
from mquant_jax.samples import Sample, each, read_samples, write_samples

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def read(folder: Path, *rows, **options) -> list[Sample]:
    """Write rows (objects, or raw lines) to a file and read it."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "s.jsonl").write_text("\n".join(lines) + "\n", "utf-8", newline="")
    return read_samples(folder / "s.jsonl", **options)


def one(folder: Path, row) -> Sample:
    (sample,) = read(folder, row)
    return sample


def test_round_trip(tmp_path) -> None:
    rng = np.random.default_rng(0)
    samples = [
        Sample((rng.integers(0, 256, (8, 8, 3), np.uint8),), f"q{i}", f"a{i}", "t")
        for i in range(3)
    ]
    write_samples(tmp_path / "set.jsonl", samples)
    back = read_samples(tmp_path / "set.jsonl")
    assert [(s.question, s.answer, s.task) for s in back] == [
        ("q0", "a0", "t"), ("q1", "a1", "t"), ("q2", "a2", "t")
    ]  # fmt: skip
    assert all(np.array_equal(a.images[0], b.images[0]) for a, b in zip(samples, back, strict=True))
    assert len(read_samples(tmp_path / "set.jsonl", limit=2)) == 2


def test_paths_are_relative_to_the_file(folder) -> None:
    sample = one(folder, {"images": ["a.png", "b.png"], "question": "same?"})
    assert sample.images == (folder / "a.png", folder / "b.png") and sample.answer == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "not valid JSON"),
        ("[1]", "expected an object"),
        ('{"image": "a.png"}', "expected an object"),
        ('{"image": "none.png", "question": "?"}', "no such picture"),
        ('{"image": 3, "question": "?"}', "neither a path nor a row"),
        ('{"image": true, "question": "?"}', "neither a path"),
        ('{"image": {"path": "a.png"}, "question": "?"}', "neither a path"),
        ('{"image": "a\\u0000.png", "question": "?"}', "no such picture"),
        ('{"image": "%s", "question": "?"}' % ("x" * 5000), "no such picture"),
        ('{"image": "https://x.org/a.png", "question": "?"}', "URLs are not downloaded"),
        ('{"image": "data:image/png;base64,@", "question": "?"}', "not base64"),
        ('{"image": "a.png", "images": ["a.png"], "question": "?"}', "both"),
        ('{"question": null}', "question: expected text, found NoneType"),
        ('{"question": 3}', "question: expected text"),
        ('{"question": "\\ud800"}', "surrogate"),
        ('{"question": "?", "answer": true}', "answer: expected text"),
        ('{"question": "?", "answer": ["x"]}', "answer: expected text"),
        ('{"question": "?", "answer": NaN}', "NaN"),
        ('{"question": "?", "answer": %s}' % ("9" * 5000), "not valid JSON"),
        ("[" * 100000, "not valid JSON"),
        ('{"question": "?", "messages": []}', "found question, messages"),
        ('{"messages": []}', "at least one turn"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\]"),
        ('{"messages": [{"role": "wizard", "content": "?"}]}', "role is 'wizard'"),
        ('{"messages": [{"role": "assistant", "content": "?"}]}', "no question from the user"),
        ('{"messages": [{"role": "user", "content": [{"type": "sound"}]}]}', "a part must be"),
        ('{"messages": [{"role": "user", "content": 3}]}', "expected text"),
        ('{"conversations": [{"from": "me", "value": "?"}]}', "from is 'me'"),
        ('{"conversations": [{"from": "human", "value": "<image>?"}]}', "1 placeholder.*0 picture"),
        ('{"conversations": "hello"}', "a conversation must be a list"),
        ("", "no samples"),
    ],
)
def test_bad_lines_are_named(folder, line, words) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read(folder, line)
    assert ("s.jsonl:1: " in str(caught.value)) == bool(line) and len(str(caught.value)) < 500


def test_all_bad_lines_are_listed_ten_at_most(folder) -> None:
    bad = [{"image": f"{i}.png", "question": "?"} for i in range(13)]
    with pytest.raises(UserError, match="13 bad samples.*s.jsonl:2: no such.*; and 3 more") as e:
        read(folder, {"question": "good"}, *bad, limit=1)  # read to the end in spite of the limit
    assert "s.jsonl:11:" in str(e.value) and "s.jsonl:12:" not in str(e.value)


def test_other_keys_are_ignored_with_one_line(folder, capsys) -> None:
    rows = [{"id": i, "question": "?", "width": 3} for i in range(3)]
    assert len(read(folder, *rows)) == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "s.jsonl" in err and err.endswith("ignored: id, width\n")


def test_nulls_and_numbers(folder) -> None:
    row = {"image": None, "images": None, "question": "2 + 2?", "answer": None, "task": None}
    sample = one(folder, row)
    assert (sample.images, sample.answer, sample.task) == ((), "", "")
    for literal in ("4", "3.50", "-1", "0.0", '"4"'):
        line = '{"question": "?", "answer": ' + literal + "}"
        assert one(folder, line).answer == literal.strip('"')


def test_bom_crlf_and_separators_inside_strings(folder) -> None:
    said = "a\u2028b\u0085c\u2029é\x1c"
    row = json.dumps({"question": said}, ensure_ascii=False)
    data = "\r\n".join([row, "", row, ""]).encode("utf-8-sig")
    (folder / "s.jsonl").write_bytes(data)
    samples = read_samples(folder / "s.jsonl")
    assert [s.question for s in samples] == [said] * 2
    assert samples[1].where.endswith("s.jsonl:3")


def test_other_encodings_are_named(folder) -> None:
    for encoding, words in (("latin-1", r"s.jsonl:2: not UTF-8 \(byte 0xe9\)"), ("utf-16", ":1: ")):
        (folder / "s.jsonl").write_bytes('{"question": "x"}\n{"question": "é"}\n'.encode(encoding))
        with pytest.raises(UserError, match=words):
            read_samples(folder / "s.jsonl")


def test_base64(folder) -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        file = io.BytesIO()
        Image.new("RGB", (64, 64), "red").save(file, kind)
        plain = base64.b64encode(file.getvalue()).decode()
        for ref in (plain, f"data:image/png;base64,{plain}", plain[:40] + "\n" + plain[40:]):
            assert one(folder, {"image": ref, "question": "?"}).images == (file.getvalue(),), kind


def test_llava_conversations(folder) -> None:
    row = {"image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}
    ]}  # fmt: skip
    sample = one(folder, row)
    assert sample.images == (folder / "a.png",) and not sample.messages
    assert (sample.question, sample.answer) == ("What is it?", "A cat.")
    row["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
    sample = one(folder, row)
    assert (sample.question, sample.answer) == ("Sure?", "Yes.")
    assert sample.messages == (
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    )
    between = [{"from": "human", "value": "Is <image>\nlike\n<image>?"}]
    sample = one(folder, {"image": ["a.png", "b.png"], "conversations": between})
    kinds = [part["type"] for part in sample.messages[0]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"] and sample.answer == ""


def test_chat_messages(folder) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
    sample = one(folder, {"messages": chat})
    assert sample.images == (file.getvalue(),)
    assert (sample.question, sample.answer, sample.messages) == ("What?", "red", ())
    system = {"role": "system", "content": "Be brief."}
    sample = one(folder, {"messages": [system, *chat], "task": "color"})
    assert [m["role"] for m in sample.messages] == ["system", "user"] and sample.task == "color"
    inside = {"role": "user", "content": [{"type": "image", "image": "a.png"}]}
    assert one(folder, {"messages": [inside]}).images == (folder / "a.png",)
    beside = {"role": "user", "content": "What?"}
    sample = one(folder, {"messages": [system, beside], "image": "a.png"})
    assert sample.messages[1]["content"][0] == {"type": "image"}


def test_an_unrelated_npz_is_left_alone(folder) -> None:
    (folder / "s.npz").write_bytes(b"no archive")
    assert one(folder, {"image": "a.png", "question": "?"}).images == (folder / "a.png",)
    for data in (None, {"other": np.zeros(3)}, {"images": np.zeros((2, 4, 4, 3))},
                 {"images": np.array([None])}):  # fmt: skip
        if data is not None:
            np.savez(folder / "s.npz", **data)
        with pytest.raises(UserError, match="s.jsonl:1: .*s.npz"):
            read(folder, {"image": 0, "question": "?"})


def test_files_that_cannot_be_read(tmp_path) -> None:
    cases = {tmp_path / "none.jsonl": "no such file", tmp_path: "regular file",
             "/dev/zero": "regular file", "a\0": "NUL", None: "expected a path",
             "x" * 300: "too long"}  # fmt: skip
    for path, words in cases.items():
        with pytest.raises(UserError, match=words):
            read_samples(path)
    for limit in (0, -1, 2.0, True, "3"):
        with pytest.raises(UserError, match="limit is"):
            read_samples(tmp_path / "none.jsonl", limit)


def test_later_errors_name_file_and_line(folder) -> None:
    def make(sample: Sample) -> str:
        if sample.images:
            raise mq.ImageError("image 0: damaged")
        return sample.question

    samples = read(folder, {"question": "x"}, *[{"image": "a.png", "question": "?"}] * 2)
    with pytest.raises(mq.ImageError, match="s.jsonl:2: image 0: damaged; .*s.jsonl:3: "):
        each(samples, make)
    assert each(samples[:1], make) == ["x"]


def test_any_locale(folder) -> None:
    (folder / "a.png").rename(folder / "é.png")
    (folder / "s.jsonl").write_text('{"question": "é\u2028", "image": "é.png"}\n', "utf-8")
    code = (
        "import sys; from mquant_jax.samples import read_samples\n"
        "from mquant_jax.models.images import load_image\n"
        "sample = read_samples(sys.argv[1])[0]; load_image(sample.images[0], '')\n"
        "print(ascii(sample.question))"
    )
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    argv = [sys.executable, "-c", code, folder / "s.jsonl"]
    out = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert out.stdout.strip() == ascii("é\u2028"), out.stderr
