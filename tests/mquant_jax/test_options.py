"""Options of the API and of the command lines, and arguments of ``generate``."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mquant_jax as mq
from convert import verify
from mquant_jax.api import Model
from mquant_jax.checkpoint.manifest import load_json
from mquant_jax.cli import main
from mquant_jax.eval.exact_match import evaluate
from mquant_jax.models.base import Prompt
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.qwen2_vl.processor import Qwen2VLProcessor
from mquant_jax.models.text import text_prompt
from mquant_jax.runtime.options import Options, sampling_key
from mquant_jax.runtime.sampling import Sampling
from mquant_jax.samples import DEMO_ASSETS, Sample
from mquant_jax.validate import shortened

NO_COUNT = [0, -5, 2.0, 2.5, np.float32(3), float("nan"), True, np.True_, "3", None, [3], 1j]
NO_NUMBER = ["0.5", None, True, np.False_, [0.5], 1j, float("nan"), float("inf"), np.nan, 10**400]


@pytest.fixture(scope="module")
def model() -> Model:
    """The bundled model without weights: enough for every check before it runs."""
    folder = DEMO_ASSETS / "model"
    config = Qwen2VLConfig.from_hf(load_json(folder / "config.json"))
    return Model(None, config, {}, Qwen2VLProcessor(folder, config))


@pytest.mark.parametrize("name", ["max_new_tokens", "batch_size", "limit", "seed"])
def test_counts(name) -> None:
    for good in (3, np.int8(3), np.uint64(3), jnp.int32(3), np.array(3)):
        value = getattr(Options(**{name: good}), name)
        assert value == 3 and type(value) is int
    for bad in NO_COUNT:
        if (name, bad) in (("limit", None), ("seed", 0)):
            continue
        with pytest.raises(mq.UserError, match=f"{name} is "):
            Options(**{name: bad})


@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_numbers(name) -> None:
    for good in (1, 1.0, np.float32(1), np.int64(1), np.float16(1), jnp.float32(1), np.array(1.0)):
        value = getattr(Sampling(**{name: good}), name)
        assert value == 1 and type(value) is float
    for bad in (*NO_NUMBER, -1, 1e-45, 5e-324, 1e-30, 1e30, -1e-45):
        with pytest.raises(mq.UserError, match=f"{name} is "):
            Sampling(**{name: bad})
    assert Sampling(temperature=-0.0) == Sampling() == Sampling(0, np.int32(0), 1)


def test_the_smallest_values_still_sample() -> None:
    from mquant_jax.runtime.sampling import per_row, sample

    logits = jnp.array([[1000.0, 999.0, -1000.0]])
    for how in (Sampling(1e-6), Sampling(1.0, top_p=1e-6), Sampling(1e6), Sampling(1e-6, 2, 1e-6)):
        rows = [per_row(how, jax.random.key(i), 1) for i in range(4)]
        tokens = [int(sample(logits, row, jnp.zeros(1, jnp.int32))[0]) for row in rows]
        assert set(tokens) == {0} or how.temperature == 1e6


def test_top_k_is_a_count() -> None:
    assert Sampling(top_k=np.int64(7)).top_k == 7
    for bad in (-1, 1.0, True, "2", None):
        with pytest.raises(mq.UserError, match="top_k is "):
            Sampling(top_k=bad)


@pytest.mark.parametrize("rtol", ["nan", "inf", "-1"])
def test_the_tolerance_of_verify(rtol, capsys) -> None:
    assert verify.main(["DST", "--reference", "DIR", "--rtol", rtol]) == 2
    assert "--rtol is " in capsys.readouterr().err


def test_names() -> None:
    for good in ("bfloat16", jnp.bfloat16, np.float32, np.dtype("float16")):
        assert Options(dtype=good).dtype == jnp.dtype(good)
    for options in ({"dtype": "int8"}, {"dtype": "float33"}, {"dtype": 32}, {"dtype": object()},
                    {"layout": "row"}, {"layout": None}, {"kv_cache": "int4"}, {"kv_cache": True},
                    {"sampling": {"temperature": 1}}, {"dtype": "float64"}):  # fmt: skip
        with pytest.raises(mq.UserError, match=f"{next(iter(options))} is .*expected"):
            Options(**options)
    for options in ({"dtype": "int8"}, {"layout": "row"}, {"kv_cache": "int4"}):
        with pytest.raises(mq.UserError, match="expected one of"):
            mq.load("no such folder", **options)  # options are checked before loading


@pytest.mark.parametrize("folder", [None, 3, b"x", "a\0b", ["x"]])
def test_a_folder_is_a_path(folder) -> None:
    with pytest.raises(mq.UserError, match="folder: "):
        mq.load(folder)


def test_keys() -> None:
    assert sampling_key(None) == jax.random.key(0)
    raw = jax.random.PRNGKey(3)
    for key in (jax.random.key(3), raw, np.asarray(raw)):
        assert jax.random.split(sampling_key(key)).shape[0] == 2
    for bad in (3, "3", jax.random.split(jax.random.key(0)), np.zeros(2), [0, 3]):
        with pytest.raises(mq.UserError, match="key is .*expected jax.random.key"):
            sampling_key(bad)


PICTURE = np.zeros((28, 28, 3), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": []}, "prompt: expected text, or a list of texts"),
        ({"prompt": ()}, "prompt: expected text"),
        ({"prompt": None}, "prompt: .*NoneType"),
        ({"prompt": b"hi"}, "prompt: .*bytes"),
        ({"prompt": (x for x in "ab")}, "prompt: .*generator"),
        ({"prompt": ["hi", None]}, "prompt 1: prompt: expected text, found NoneType"),
        ({"prompt": "\ud800"}, "prompt: .*surrogate"),
        ({"images": "a.png"}, "images: expected a sequence"),
        ({"images": None}, "images: expected a sequence"),
        ({"images": PICTURE}, r"images: expected a sequence.*uint8 \[28, 28, 3\]"),
        ({"images": Image.fromarray(PICTURE)}, "images: expected a sequence"),
        ({"images": io.BytesIO()}, "images: expected a sequence"),
        ({"images": [None]}, "image 0: .*NoneType"),
        ({"images": ["none.png"]}, "none.png: no such file"),
        ({"images": [PICTURE], "prompt": ["a", "b"]}, "2 prompts but 1 lists"),
        ({"images": [[], "a.png"], "prompt": ["a", "b"]}, "prompt 1: images: expected"),
        ({"images": "ab", "prompt": ["a", "b"]}, "images: expected a sequence"),
        ({"videos": "clip.mp4"}, "videos: expected a sequence"),
        ({"videos": [PICTURE]}, "video 0: expected a sequence of frames"),
        ({"videos": [(None for _ in range(2))]}, "video 0, frame 0"),
        ({"videos": np.zeros((2, 28, 28, 3), np.uint8)}, "videos: expected a sequence"),
        ({"stream": 3}, "stream"),
        ({"stream": print, "prompt": ["a"]}, "stream"),
        ({"key": 3}, "key is 3"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": "0.5"}, "top_p is '0.5'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
    ],
)
def test_arguments_of_generate(model, arguments, words) -> None:
    with pytest.raises(mq.UserError, match=words):
        model.generate(**{"prompt": "hi", **arguments})


def test_prompts_made_by_hand(model) -> None:
    vocab = model.config.language.vocab_size
    nothing = np.zeros((0, 0), np.float32)
    grid = Prompt([1, 2], [(1, 2, 2)], np.zeros((4, model.config.vision.patch_dim), np.float32))
    for prompts, words in (
        ([], "prompts: expected a list"), (None, "prompts: expected a list"),
        (["hi"], "prompt 0: expected a Prompt, found str"),
        ([Prompt([], [], nothing)], "no tokens"), ([text_prompt([vocab])], "vocabulary of"),
        ([text_prompt([-1])], "vocabulary of"), ([grid], "1 pictures given, placeholders for 0"),
    ):  # fmt: skip
        for call in (model.collate, lambda p: model.generate_prompts(p, 3)):
            with pytest.raises(mq.PromptError, match=words):
                call(prompts)
    with pytest.raises(mq.PromptTooLong, match="the model's context is"):
        model.collate([text_prompt([1] * model.max_positions)])


def test_evaluation_names_what_is_wrong(model) -> None:
    samples = [
        Sample((), "hi", "x", where="s.jsonl:1"),
        Sample(("none.png",), "?", where="s.jsonl:2"),
    ]
    for options in ({"batch_size": -5}, {"batch_size": 2.0}, {"max_new_tokens": 0}):
        with pytest.raises(mq.UserError, match=f"{next(iter(options))} is"):
            evaluate(model, samples, **options)
    with pytest.raises(mq.ImageError, match="s.jsonl:2: none.png: no such file"):
        evaluate(model, samples)
    with pytest.raises(mq.UserError, match="no samples"):
        evaluate(model, [])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["eval", "DST", "--batch-size", "-5"], "batch_size is -5"),
        (["eval", "DST", "--limit", "0"], "limit is 0"),
        (["eval", "DST", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["eval", "DST", "--limit", "2.5"], "invalid int value"),
        (["generate", "DST", "--prompt", "?", "--temperature", "nan"], "temperature is nan"),
        (["generate", "DST", "--prompt", "?", "--temperature", "1e-45"], "temperature is 1e-45"),
        (["generate", "DST", "--prompt", "?", "--top-p", "nan"], "top_p is nan"),
        (["generate", "DST", "--prompt", "?", "--seed", str(10**30)], "seed is 10000"),
        (["bench", "DST", "--batch", "0"], "--batch is 0"),
        (["bench", "DST", "--image-side", "-1"], "--image-side is -1"),
        (["inspect", "DST", "--points", "-1"], "--points is -1"),
        (["demo", "--limit", "0"], "limit is 0"),
    ],
)
def test_command_lines_refuse_before_they_load(argv, words, capsys) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1, err


def test_exceptions_are_exported() -> None:
    assert {"ImageError", "PromptTooLong", "CheckpointError", "load"} <= set(dir(mq))
    assert issubclass(mq.PromptTooLong, mq.PromptError) and issubclass(mq.PromptError, mq.UserError)
    assert issubclass(mq.ImageError, mq.UserError) and issubclass(mq.CheckpointError, mq.UserError)
    assert all(hasattr(mq, name) for name in mq.__all__)


def test_long_and_unprintable_texts_are_shortened() -> None:
    assert shortened("a\0\ud800") == r"a\x00\ud800" and len(shortened("x" * 9999)) < 130
