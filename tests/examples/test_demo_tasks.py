"""The tasks of the demonstration model, and its tokenizer."""

from __future__ import annotations

import numpy as np
import pytest

from examples import demo_tasks, demo_tokenizer


@pytest.fixture(scope="module")
def train() -> list[demo_tasks.Sample]:
    return demo_tasks.batch(np.random.default_rng(3), 1500, "train")


@pytest.fixture(scope="module")
def heldout() -> list[demo_tasks.Sample]:
    return demo_tasks.eval_set(300, seed=3)


def test_same_seed_gives_same_samples() -> None:
    first, second = demo_tasks.eval_set(40, seed=7), demo_tasks.eval_set(40, seed=7)
    for a, b in zip(first, second, strict=True):
        assert (a.question, a.answer, a.task, a.key) == (b.question, b.answer, b.task, b.key)
        np.testing.assert_array_equal(a.image, b.image)
    other = demo_tasks.eval_set(40, seed=8)
    assert [s.key for s in first] != [s.key for s in other]


def test_samples_have_the_documented_form(heldout: list[demo_tasks.Sample]) -> None:
    for s in heldout:
        assert s.image.dtype == np.uint8 and s.image.shape == (84, 84, 3)
        assert s.image.std() > 3
    share = np.mean([s.task == "read" for s in heldout])
    assert 0.4 <= share <= 0.5
    counts = {s.answer for s in heldout if s.task == "count"}
    assert counts <= set("123456")


def test_splits_are_disjoint(
    train: list[demo_tasks.Sample], heldout: list[demo_tasks.Sample]
) -> None:
    easy = demo_tasks.batch(np.random.default_rng(4), 500, "train", difficulty=0.2)
    seen = {s.key for s in [*train, *easy, *demo_tasks.calibration_set(64)]}
    assert not seen & {s.key for s in heldout}
    assert all(demo_tasks.split_of(key) == "train" for key in seen)
    assert all(demo_tasks.split_of(s.key) == "heldout" for s in heldout)


def test_yes_and_no_are_balanced() -> None:
    rng = np.random.default_rng(0)
    answers = [demo_tasks.make(rng, "relation", "train").answer for _ in range(1000)]
    yes, no = answers.count("yes"), answers.count("no")
    assert 0.4 < yes / (yes + no) < 0.6


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split"):
        demo_tasks.make(np.random.default_rng(0), "read", "test")


def test_text_round_trips(train: list[demo_tasks.Sample]) -> None:
    tokenizer = demo_tokenizer.build()
    texts = [s.question for s in train[:300]] + [s.answer for s in train[:300]]
    texts += ["Unseen words, 12.5 %!\n\tÜber 量化 🙂", "  two  spaces ", "red redder hundred"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_read_answers_are_spelled_out(train: list[demo_tasks.Sample]) -> None:
    tokenizer = demo_tokenizer.build()
    for s in train:
        if s.task == "read":
            assert len(tokenizer.encode(s.answer).ids) == len(s.answer)


def test_questions_are_short(train: list[demo_tasks.Sample]) -> None:
    tokenizer = demo_tokenizer.build()
    assert max(len(tokenizer.encode(s.question).ids) for s in train) <= 11


def test_saved_tokenizer_loads_with_its_chat_template(tmp_path) -> None:
    tokenizer = demo_tokenizer.load(demo_tokenizer.save(tmp_path))
    built = demo_tokenizer.build()
    question = "how many red circles?"
    assert tokenizer(question)["input_ids"] == built.encode(question).ids
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>how many red circles?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 6 + 5 + 5
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == "<|im_end|>"


def test_collated_batch_has_qwen2_vl_layout() -> None:
    demo_model = pytest.importorskip("examples.demo_model", exc_type=ImportError)
    samples = demo_tasks.eval_set(6, seed=2)
    batch, targets = demo_model.Collator()(samples)
    for i, s in enumerate(samples):
        real = batch.order[i] >= 0
        assert (batch.token_class[i][~real] == -1).all()
        visual = batch.token_class[i] == 1
        np.testing.assert_array_equal(batch.visual_index[i][visual], np.arange(9) + 9 * i)
        t, h, w = batch.positions[:, i, visual]
        assert (t == 4).all()
        np.testing.assert_array_equal(3 * (h - 4) + (w - 4), np.arange(9))
        after = batch.positions[:, i, real][:, 4 + 9 :]
        np.testing.assert_array_equal(
            after, np.broadcast_to(7 + np.arange(after.shape[1]), after.shape)
        )
        answer = [int(x) for x in targets["answer"][i] if x >= 0]
        assert demo_tokenizer.build().decode(answer, skip_special_tokens=True) == s.answer
    row, col = batch.vision.coords[0, 7]
    patch = samples[0].image[14 * row : 14 * row + 14, 14 * col : 14 * col + 14] / 255
    expected = ((patch - demo_model.MEAN) / demo_model.STD).transpose(2, 0, 1)
    got = batch.vision.patches[0, 7].reshape(3, 2, 14, 14)
    np.testing.assert_allclose(got, np.stack([expected] * 2, 1), atol=1e-5)
