"""The bundled model end to end: convert, load, generate, bench, errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mquant_jax as mq
from mquant_jax.checkpoint.reader import load_params
from mquant_jax.cli import COMMANDS, main
from mquant_jax.commands.demo import converted
from mquant_jax.eval.exact_match import evaluate
from mquant_jax.models.base import Prompt
from mquant_jax.samples import BUNDLED_CALIBRATION, BUNDLED_HELDOUT, DEMO_ASSETS, read_samples
from tests.helpers import form_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders that the demo command makes and reuses."""
    root = tmp_path_factory.mktemp("demo")
    for name in ("float", "w4a8"):
        converted(root, name)
    return root


@pytest.fixture(scope="module")
def models(folders):
    return {name: mq.load(folders / name) for name in ("float", "w4a8")}


@pytest.fixture(scope="module")
def held_out():
    return read_samples(BUNDLED_HELDOUT)


def run(capsys, *argv) -> tuple[int, str, str]:
    status = main(list(map(str, argv)))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_bundled_sets_are_disjoint(held_out) -> None:
    calibration = read_samples(BUNDLED_CALIBRATION)
    assert (len(calibration), len(held_out)) == (64, 500)
    seen = {s.images[0].tobytes() for s in calibration}
    assert not any(s.images[0].tobytes() in seen for s in held_out)
    strings = {s.answer for s in calibration if s.task == "read"}
    assert strings and not any(s.answer in strings for s in held_out if s.task == "read")


@pytest.mark.parametrize("count", [125, pytest.param(500, marks=pytest.mark.slow)])
def test_w4a8_stays_within_two_points_of_float(models, held_out, count) -> None:
    samples = held_out[:count]
    # The size of a batch that test_the_demo_command compiles as well.
    results = {name: evaluate(m, samples, batch_size=25) for name, m in models.items()}
    assert results["float"].score >= 0.9
    assert results["w4a8"].score >= results["float"].score - 0.02
    assert set(results["float"].by_task()) == {"read", "shape", "color", "count", "relation"}


def test_quantised_weights_take_four_bits_on_disk(folders) -> None:
    manifest = json.loads((folders / "w4a8" / "mquant.json").read_text())
    quantised = [t for t in manifest["tensors"].values() if "bits" in t]
    kernels = [t for t in quantised if t["bits"] == 4]
    assert len(quantised) == len(kernels) + 1  # plus the head in 8 bits
    assert sum(t["bytes"] for t in kernels) <= 0.27 * sum(2 * np.prod(t["shape"]) for t in kernels)
    bf16 = sum(2 * np.prod(t["shape"]) for t in quantised)
    assert sum(t["bytes"] for t in quantised) <= 0.35 * bf16
    params = (folders / "w4a8" / "params").rglob("*")
    source = (DEMO_ASSETS / "model" / "model.safetensors").stat().st_size
    assert sum(p.stat().st_size for p in params if p.is_file()) <= 0.35 * source


def test_the_api_takes_one_prompt_or_many(models, held_out) -> None:
    model = models["w4a8"]
    pick = [s for s in held_out if s.task == "read"][:3]
    one = [model.generate([s.images[0]], s.question, max_new_tokens=8) for s in pick]
    many = model.generate([[s.images[0]] for s in pick], [s.question for s in pick],
                          max_new_tokens=8)  # fmt: skip
    assert one == many
    pieces: list[str] = []
    streamed = model.generate([pick[0].images[0]], pick[0].question, max_new_tokens=8,
                              stream=pieces.append)  # fmt: skip
    assert "".join(pieces) == streamed == one[0]


def test_several_pictures_and_ragged_batches(models, held_out) -> None:
    model, a, b = models["float"], held_out[0].images[0], held_out[1].images[0]
    together = model.generate([[a, b], [a], []], ["read the word", "how many crosses?", "hello"],
                              max_new_tokens=4)  # fmt: skip
    alone = [
        model.generate([a, b], "read the word", max_new_tokens=4),
        model.generate([a], "how many crosses?", max_new_tokens=4),
        model.generate([], "hello", max_new_tokens=4),
    ]
    assert together == alone


def test_sampling_with_a_key(models, held_out) -> None:
    s, model = held_out[0], models["w4a8"]
    texts = [
        model.generate([s.images[0]], s.question, temperature=3.0, max_new_tokens=12,
                       key=jax.random.key(k))
        for k in (1, 1, 2)
    ]  # fmt: skip
    assert texts[0] == texts[1] != texts[2]


def test_generate_from_the_command_line(folders, held_out, tmp_path, capsys) -> None:
    from PIL import Image

    s = next(s for s in held_out if s.task == "color")
    Image.fromarray(s.images[0]).save(tmp_path / "a.png")
    args = ("generate", folders / "float", "--image", tmp_path / "a.png", "--prompt", s.question)
    status, out, _ = run(capsys, *args)
    assert status == 0 and out.strip() == s.answer
    status, out, _ = run(capsys, *args, "--json")
    assert status == 0 and json.loads(out)["answer"] == s.answer


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--image", "none.png", "--prompt", "?"], "none.png: no such file"),
        (["--image", "{text}", "--prompt", "?"], "not a readable image"),
        (["--prompt", "<|image_pad|> and <|image_pad|>"], "2 image placeholders, but 0 images"),
        (["--prompt", "a " * 3000], "the model's context is 2048"),
        (["--prompt", "?", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "?", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "?", "--frobnicate"], "unrecognized arguments"),
        ([], "--prompt"),
    ],
)
def test_bad_input_is_one_line(folders, tmp_path, capsys, extra, words) -> None:
    (tmp_path / "text.png").write_text("I am no picture")
    argv = [a.format(text=tmp_path / "text.png") for a in extra]
    status, out, err = run(capsys, "generate", folders / "w4a8", *argv)
    assert status == 2 and not out and words in err and err.count("\n") == 1, err


def test_bad_commands_and_checkpoints(tmp_path, capsys) -> None:
    assert run(capsys, "frob")[0] == 2
    status, _, err = run(capsys, "inspect", tmp_path / "none")
    assert status == 2 and "no such folder" in err
    status, out, _ = run(capsys, "--help")
    assert status == 0 and all(name in out for name in COMMANDS)


def test_inspect_names_what_runs(folders, capsys) -> None:
    status, out, _ = run(capsys, "inspect", folders / "w4a8", "--json")
    layers = {row["layer"]: row for row in json.loads(out)["layers"]}
    down = load_params(folders / "w4a8")[0]["language/layers/0/down_proj/kernel"]
    assert status == 0
    assert layers["language/layers/*/down_proj"] | {"count": 0} == {
        "layer": "language/layers/*/down_proj", "count": 0, "weights": "int4", "group_size": None,
        "activations": "int8 static", "one_row": form_of(1, down),
        "many_rows": form_of(64, down),
    }  # fmt: skip
    assert layers["language/head"]["weights"] == "int8"
    assert run(capsys, "inspect", folders / "float")[0] == 0


def test_bench_compares_with_both_floats(folders, capsys) -> None:
    size = ("--text-tokens", 16, "--image-side", 56, "--new-tokens", 2, "--repeats", 2)
    status, out, _ = run(capsys, "bench", folders / "w4a8", "--json", *size)
    result = json.loads(out)
    assert status == 0 and [r["variant"] for r in result["rows"]] == ["float32", "bfloat16", "w4a8"]
    parts, others = ("vision", "prefill", "decode"), ("float32", "bfloat16")
    assert {f"{part}_vs_{other}" for part in parts for other in others} == set(result["ratios"])
    assert run(capsys, "bench", folders / "w4a8", "--repeats", 0)[0] == 2


def test_the_demo_command(folders, capsys) -> None:
    made = (folders / "w4a8" / "mquant.json").stat().st_mtime_ns
    status, out, _ = run(capsys, "demo", "--json", "--limit", 20, "--out", folders)
    result = json.loads(out)
    assert (folders / "w4a8" / "mquant.json").stat().st_mtime_ns == made  # not converted again
    assert status == 0 and result["n"] == 20
    assert result["w4a8_bytes"] < 0.35 * result["float_bytes"]
    assert 0 <= result["w4a8_exact_match"] <= 1 and 0 <= result["float_exact_match"] <= 1
    assert (folders / "contact_sheet.png").stat().st_size > 10_000


def test_eval_goes_on_where_it_was_stopped(folders, tmp_path, capsys) -> None:
    argv = ["eval", folders / "float", folders / "w4a8", "--limit", 12, "--batch-size", 4, "--json",
            "--out", tmp_path]  # fmt: skip
    status, out, _ = run(capsys, *argv)
    result = json.loads(out)
    assert status == 0 and (result["task"], result["n"]) == ("demo", 12)
    assert result["models"][0]["score"] >= 75 and result["models"][1]["ci95"]
    for path in tmp_path.glob("*/answers.jsonl"):
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:7]) + lines[7][:9])  # header, six answers and part of one
    assert json.loads(run(capsys, *argv)[1]) == result


def test_perplexity_of_a_text(models, folders, tmp_path, capsys) -> None:
    text = "how many circles are there? read the word. what color is the square?"
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    argv = ("eval", folders / "float", "--task", "perplexity", "--data", tmp_path / "t.txt")
    got = json.loads(run(capsys, *argv, "--json")[1])["models"][0]
    model = models["float"]
    ids = model.processor.encode(text)
    prompt = Prompt(ids, [], np.zeros((0, 0), np.float32))
    logits = model.module(jax.tree.map(jnp.asarray, model.processor.collate([prompt])))[0]
    losses = -jax.nn.log_softmax(logits)[jnp.arange(len(ids) - 1), jnp.asarray(ids[1:])]
    assert got["score"] == pytest.approx(float(jnp.exp(losses.mean())), rel=1e-4)
    assert got["metrics"]["tokens"] == len(ids) - 1
