"""Runs that are stopped and go on, comparisons and pages, with a model that is a table."""

import base64
import dataclasses
import io
import json
import types
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mquant_jax.commands import evaluate as command
from mquant_jax.errors import UserError
from mquant_jax.eval import evaluation, perplexity
from mquant_jax.eval.answers import Answer, AnswerFile
from mquant_jax.eval.evaluation import Checks, evaluate
from mquant_jax.eval.runner import ask
from mquant_jax.eval.swap import with_swapped_pictures
from mquant_jax.eval.table import text, write_flips
from mquant_jax.eval.tasks import TASKS
from mquant_jax.eval.tasks.plain import questions_from
from mquant_jax.models.base import Prompt
from mquant_jax.runtime.options import Options
from mquant_jax.samples import Sample
from tests.helpers import fails

VOCABULARY = 129


class Processor:
    """Each character is a token."""

    def prompt(self, text, images=(), videos=()):
        if text == "bad":
            raise UserError("no prompt")
        return Prompt(list(map(ord, text)), [], np.zeros((0, 0), np.float32))

    def encode(self, text):
        return list(map(ord, text))

    def decode(self, ids):
        return "".join(map(chr, ids))


@dataclasses.dataclass
class Parrot:
    """Replies from a table; raises KeyboardInterrupt after ``stops_after`` batches."""

    replies: dict
    stops_after: int = 10**9
    name: str = "parrot"
    batches: list = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.processor, self.max_positions = Processor(), 100
        self.manifest = {"sha256": self.name * 8, "family": "parrot", "recipe": {}}
        language = types.SimpleNamespace(dtype=jnp.float32)
        self.module = types.SimpleNamespace(language=language)

    @property
    def generator(self):
        return self

    def collate(self, prompts):
        return prompts

    def force(self, prompts, answers):
        """Gives its own reply's next character probability 1/2; the rest of ``VOCABULARY`` shares
        the other half."""
        said = [self.replies["".join(map(chr, p.input_ids))] for p in prompts]
        for i in range(max(map(len, answers)) + 1):
            rows = np.full((len(said), VOCABULARY), np.log(0.5 / (VOCABULARY - 1)), np.float32)
            for row, reply in zip(rows, said, strict=True):
                row[ord(reply[i]) if i < len(reply) else 0] = np.log(0.5)
            yield rows

    def generate_prompts(self, prompts, max_new_tokens):
        if len(self.batches) == self.stops_after:
            raise KeyboardInterrupt
        asked = ["".join(map(chr, p.input_ids)) for p in prompts]
        self.batches.append(asked)
        return types.SimpleNamespace(tokens=[list(map(ord, self.replies[q])) for q in asked])


def samples(n=11):
    return [Sample((), "q" * (1 + i * 7 % n), f"answer {i * 7 % n}") for i in range(n)]


def replies(n=11, wrong=()):
    out = {"q" * (1 + i): f"answer {i}" for i in range(n)}
    return out | {"q" * (1 + i): text for i, text in dict(wrong).items()}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "s.jsonl"
    rows = [{"question": s.question, "answer": s.answer, "task": "t"} for s in samples()]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def models(monkeypatch):
    known = {
        "a/float": Parrot(replies(), name="0"),
        "b/w4": Parrot(replies(wrong={3: "answer 4", 5: ""}), name="1"),
    }
    monkeypatch.setattr(evaluation, "load", lambda path, **_: known[str(path)])
    return known


def test_batches_are_cut_from_the_full_list() -> None:
    model = Parrot(replies())
    answers = ask(model, questions_from(samples()), Options(9, batch_size=2))
    assert [a.text for a in answers] == [s.answer for s in samples()]
    assert sorted(len(b) for b in model.batches) == [1, 2, 2, 2, 2, 2]
    first = [len(q) for b in model.batches[:4] for q in b]
    assert first == sorted(first)  # the first window's eight questions are sorted by length
    fails("no samples", lambda: ask(model, [], Options()))
    fails("f.jsonl:3: no prompt", lambda: ask(
        model, questions_from([Sample((), "bad", where="f.jsonl:3")]), Options()))  # fmt: skip


@pytest.mark.parametrize("stop", [0, 1, 4, 5])
def test_a_run_that_goes_on_makes_the_same_batches(models, data, tmp_path, stop) -> None:
    task, options = TASKS["jsonl"], Options(9, batch_size=2)
    whole = evaluate(["a/float"], task, data, options, tmp_path / "whole")
    batches = list(models["a/float"].batches)
    models["a/float"].batches.clear()
    models["a/float"].stops_after = stop
    with pytest.raises(KeyboardInterrupt):
        evaluate(["a/float"], task, data, options, tmp_path / "parts")
    models["a/float"].stops_after = 10**9
    (folder,) = (tmp_path / "parts").iterdir()
    with (folder / "answers.jsonl").open("ab") as file:
        file.write(b'{"id": "3", "text": "ans')  # a line truncated by a kill
    again = evaluate(["a/float"], task, data, options, tmp_path / "parts")
    assert models["a/float"].batches == batches and again.to_json() == whole.to_json()
    results = [json.loads((tmp_path / p / folder.name / "result.json").read_text())
               for p in ("whole", "parts")]  # fmt: skip
    for result in results:
        assert result.pop("times")["questions_asked"] and result.pop("devices")
    assert results[0] == results[1]
    asked = len(models["a/float"].batches)
    evaluate(["a/float"], task, data, options, tmp_path / "parts")
    assert len(models["a/float"].batches) == asked  # all questions are answered


def test_the_record_of_a_run(models, data, tmp_path) -> None:
    evaluate(["a/float"], TASKS["jsonl"], data, Options(9, batch_size=2, limit=3), tmp_path / "o")
    (folder,) = (tmp_path / "o").iterdir()
    run = json.loads((folder / "result.json").read_text())["run"]
    assert run["checkpoint"] == "0" * 8 and run["data"]["s.jsonl"]["sha256"] and run["limit"] == 3
    assert run["decoding"]["max_new_tokens"] == 9 and run["prompt"]["example"] == "q"
    assert {"recipe", "preprocessor", "versions", "dtype", "option_rules"} <= set(run)
    assert json.loads((folder / "answers.jsonl").read_text().splitlines()[1])["id"] == "0"
    other = Options(8, batch_size=2, limit=3)
    fails("made with a different decoding", lambda: evaluate(
        ["a/float"], TASKS["jsonl"], data, other, tmp_path / "o"))  # fmt: skip


def test_damaged_answers_are_named(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    AnswerFile(path, {"x": 1}).add([("ü\ud800", Answer("日本\n\u2028", 2))])
    assert AnswerFile(path, {"x": 1}).found == {"ü\ud800": Answer("日本\n\u2028", 2)}
    fails("made with a different x: 1, now 2", lambda: AnswerFile(path, {"x": 2}))
    good = path.read_bytes()
    for bad, words in (
        (b"{nonsense\n", "a.jsonl:3: damaged"),
        (b'{"id": 3}\n', "a.jsonl:3: not an answer"),
        (b"[]\n", "a.jsonl:3: damaged: not a JSON object"),
    ):
        path.write_bytes(good + bad)
        fails(words, lambda: AnswerFile(path, {"x": 1}))
    path.write_bytes(b"{}\n")
    fails("not an answer file", lambda: AnswerFile(path, {"x": 1}))
    path.write_bytes(b'{"run": {"x"')  # killed while the header was written
    assert AnswerFile(path, {"x": 1}).found == {}


def test_several_checkpoints_against_the_first(models, data) -> None:
    result = evaluate(["a/float", "b/w4"], TASKS["jsonl"], data, Options(9, batch_size=4))
    out = result.to_json()
    first, second = out["models"]
    assert out["task"] == "jsonl" and out["n"] == 11
    assert (
        repr(result) == "Evaluation(jsonl, 11 questions, score in '%', a/float: 100, b/w4: 81.82)"
    )
    assert first["score"] == 100 and first["delta"] is first["ci95"] is first["flips"] is None
    assert second["delta"] == pytest.approx(-200 / 11) == second["score"] - 100
    assert second["ci95"][0] < second["delta"] < second["ci95"][1] <= 0
    assert second["flips"] == {"right_to_wrong": 2, "wrong_to_right": 0} and second["empty"] == 1
    assert second["mcnemar_p"] == 0.5
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate([], TASKS["jsonl"], data)


def test_agreement_and_divergence_on_the_first_ones_answers(models, data, tmp_path) -> None:
    def run(kl=0, agreement=True, folder=None):
        checks = Checks(agreement, kl)
        out = evaluate(["a/float", "b/w4"], TASKS["jsonl"], data, Options(9, batch_size=3), folder,
                       checks=checks)  # fmt: skip
        first, second = out.to_json()["models"]
        assert first["token_agreement"] is first["kl_nats"] is None
        return second["token_agreement"], second["kl_nats"]

    # 9 answers of 8 characters, one of 9, each with its end; "answer 4" for "answer 3" differs in
    # one position, "" for "answer 5" in all 8 that are not the end.
    positions = 10 * 9 + 10
    assert run() == (pytest.approx(1 - 9 / positions), None)
    # Where the likeliest token is another one: 1/2 of the mass against (1/2) / 128, both ways.
    nats = (0.5 - 0.5 / 128) * np.log(128)
    agreement, kl = run(kl=100, agreement=False, folder=tmp_path)
    assert agreement == pytest.approx(1 - 9 / positions)
    assert kl == pytest.approx(9 * nats / positions, rel=1e-5)
    # "answer 3" is the third question.
    assert run(kl=2)[1] == 0 and run(kl=3)[1] == pytest.approx(nats / 27, rel=1e-5)
    fails("kl is -1", lambda: Checks(kl=-1))
    fails("give at least two", lambda: evaluate(
        ["a/float"], TASKS["jsonl"], data, checks=Checks(kl=1)))  # fmt: skip
    fails("scores a text", lambda: evaluate(
        ["a/float", "b/w4"], TASKS["perplexity"], data, checks=Checks(True)))  # fmt: skip


def test_vocabularies_of_two_sizes_are_not_compared(models, data, monkeypatch) -> None:
    small = lambda prompts, answers: iter([np.zeros((len(prompts), 7))] * 20)  # noqa: E731
    monkeypatch.setattr(models["b/w4"], "force", small)
    fails("vocabulary has 129 tokens, this one's 7", lambda: evaluate(
        ["a/float", "b/w4"], TASKS["jsonl"], data, checks=Checks(True)))  # fmt: skip


def test_answers_that_do_not_fit_a_model(models, data) -> None:
    models["b/w4"].max_positions = 15
    fails("answer have 20 tokens, this model's context is 15", lambda: evaluate(
        ["a/float", "b/w4"], TASKS["jsonl"], data, checks=Checks(True)))  # fmt: skip


def with_pictures(*pictures):
    return questions_from([Sample(tuple(p), f"q{i}", "a") for i, p in enumerate(pictures)])


def test_swapped_pictures_are_others_and_as_many() -> None:
    a, b, c, d = (np.full((2, 2, 3), i, np.uint8) for i in range(4))
    questions = with_pictures([a], [a], [b], [], [c], [a, b], [c, d])
    swapped = with_swapped_pictures(questions)
    assert [q.id for q in swapped] == [q.id for q in questions]
    assert swapped[0].sample.images[0] is swapped[1].sample.images[0] is b
    assert swapped[2].sample.images[0] is c and swapped[4].sample.images[0] is a
    assert swapped[3] == questions[3]
    assert swapped[5].sample.images[0] is c and swapped[6].sample.images[1] is b
    assert all(
        s.sample.question == q.sample.question for s, q in zip(swapped, questions, strict=True)
    )
    fails("no pictures can be swapped", lambda: with_swapped_pictures(
        with_pictures([a], [a], [], [a, b])))  # fmt: skip


def test_a_model_that_looks_at_pictures_fails_on_others(models, tmp_path) -> None:
    shades = {"0": 10, "1": 200}
    rows = [{"question": "q", "answer": f"a{i}", "image": f"{i}.png"} for i in shades]
    for i, shade in shades.items():
        Image.new("L", (8, 8), shade).save(tmp_path / f"{i}.png")
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")

    def seen(text, images=(), videos=()):
        return Prompt([ord(p.stem) for p in images], [], np.zeros((0, 0), np.float32))

    model = models["a/float"]
    model.processor.prompt, model.replies = seen, {"0": "a0", "1": "a1"}
    checks = Checks(swap_images=True)
    run = lambda: evaluate(["a/float"], TASKS["jsonl"], path, Options(4, batch_size=1),  # noqa: E731
                           tmp_path / "o", checks=checks)  # fmt: skip
    (result,) = run().to_json()["models"]
    assert (result["score"], result["swapped_images_score"]) == (100, 0)
    asked = len(model.batches)
    assert run().to_json()["models"] == [result] and len(model.batches) == asked == 4
    assert "pictures swapped" in text(run())


def test_perplexity_of_windows(monkeypatch, models, tmp_path) -> None:
    class Scorer:
        devices = 2

        def __init__(self, model):
            self.nats = 1.0 + int(model.name)

        def __call__(self, windows):
            assert len({len(ids) for ids in windows}) == 1
            return [(len(ids) - 1) * self.nats for ids in windows]

    monkeypatch.setattr(perplexity, "Scorer", Scorer)
    path = tmp_path / "t.txt"
    path.write_text("x" * 199, encoding="utf-8")  # windows of 99, 99 and 1, which predicts nothing
    out = evaluate(["a/float", "b/w4"], TASKS["perplexity"], path).to_json()
    assert out["n"] == 2 and out["unit"] == "per token"
    assert [m["score"] for m in out["models"]] == pytest.approx([np.e, np.e**2])
    assert out["models"][0]["metrics"] == {"nats_per_token": 1, "tokens": 196}
    assert out["models"][1]["delta"] == pytest.approx(np.e**2 - np.e)
    assert out["models"][1]["flips"] is None and out["models"][1]["empty"] == 0
    path.write_text("x", encoding="utf-8")
    fails("has 1 tokens", lambda: evaluate(["a/float"], TASKS["perplexity"], path))


def test_the_command(models, tmp_path, capsys) -> None:
    Image.new("RGB", (900, 30), "red").save(tmp_path / "wide.png")
    rows = [{"question": s.question, "answer": s.answer, "image": "wide.png"} for s in samples()]
    rows[0]["answer"] += "<script>"
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    argv = ["a/float", "b/w4", "--samples", str(path), "--out", str(tmp_path / "o")]
    assert command.main([*argv, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "o" / "evaluation.json").read_text())
    page = (tmp_path / "o" / "flips.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 2 and "right to wrong (2)" in page
    assert "http" not in page and "<script" not in page and "(empty)" in page
    assert command.main(argv) == 0
    shown = capsys.readouterr().out
    assert "11 questions" in shown and "McNemar" in shown and "b/w4" in shown
    fails("give one of them", lambda: command.main([*argv, "--task", "mme"]))
    fails("task is 'frob'", lambda: command.main(["a/float", "--task", "frob"]))
    fails("needs --data FILE", lambda: command.main(["a/float", "--task", "mme"]))


def test_windows_of_one_length_go_together() -> None:
    windows = [(str(i), [0] * n) for i, n in enumerate([5, 5, 5, 5, 5, 3])]
    keys = [[key for key, _ in some] for some in perplexity.rounds(windows, 2)]
    assert keys == [["0", "1"], ["2", "3"], ["4"], ["5"]] and perplexity.rounds([], 2) == []


class Page(HTMLParser):
    """Tags that are open, and what pictures and links name."""

    VOID = ("meta", "img")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        attrs = dict(attrs)
        assert tag != "img" or attrs["alt"]
        assert tag not in ("script", "link", "iframe")
        self.sources += [attrs[name] for name in ("src", "href") if name in attrs]
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def test_the_page_of_flips_is_whole_and_alone(models, tmp_path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    rows = [{"question": s.question, "answer": s.answer, "image": "a.png"} for s in samples()]
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    models["b/w4"].replies["q" * 4] = '<img src=x onerror="1">&"'
    out = evaluate(["a/float", "b/w4"], TASKS["jsonl"], path, checks=Checks(agreement=True))
    write_flips(out, tmp_path / "flips.html")
    text_of_page = (tmp_path / "flips.html").read_text(encoding="utf-8")
    page = Page(text_of_page)
    assert page.open == [] and len(page.sources) == 2 and "same token" in text_of_page
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    for source in page.sources:
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).verify()
