"""The engine: batching, options, streaming, cancelling, errors, reuse of prefixes."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

import mquant_jax as mq
from mquant_jax.models.base import Prompt
from mquant_jax.runtime.generate import Generator
from mquant_jax.runtime.programs import Programs
from mquant_jax.runtime.sampling import Sampling
from mquant_jax.samples import BUNDLED_HELDOUT, read_samples
from tests.helpers import fails

Options = mq.RequestOptions
CHUNK = 64


@pytest.fixture(scope="module")
def loaded(demo_float):
    return mq.load(demo_float)


@pytest.fixture(scope="module")
def model(loaded):
    """The demo model without stop tokens: every answer runs to its limit."""
    return dataclasses.replace(loaded, _generator=Generator(loaded.module, (-1,)))


@pytest.fixture(scope="module")
def prompts(model):
    """Requests of every kind: text only, one picture, several, more tokens than a chunk."""
    samples = read_samples(BUNDLED_HELDOUT, 8)
    pictures = [s.images[0] for s in samples]
    made = [s.prompt(model.processor) for s in samples[:4]]
    made += [model.processor.prompt("what is it? " * n) for n in (1, 9, 20, 50)]
    made += [model.processor.prompt(f"and {n}?", pictures[:n]) for n in (2, 3, 5, 8)]
    large = np.random.default_rng(0).integers(0, 256, (420, 350, 3), np.uint8)
    made += [
        model.processor.prompt("large " * n, [large[: 40 * n], pictures[n]]) for n in (1, 4, 7)
    ]
    assert max(len(p.input_ids) for p in made) > 4 * CHUNK
    return [*made, made[0]]


@pytest.fixture(scope="module")
def alone(model, prompts):
    """Tokens that ``generate`` gives for each prompt alone."""
    return [model.generate_prompts([p], lengths(i)).tokens[0] for i, p in enumerate(prompts)]


def lengths(i: int) -> int:
    return 1 + 5 * i % 17


@pytest.fixture(scope="module")
def engine(model):
    with mq.Engine(model, slots=4, context=700, prefill_chunk=CHUNK) as engine:
        yield engine


def test_company_changes_no_greedy_answer(engine, prompts, alone) -> None:
    before = engine.stats()
    options = [Options(max_new_tokens=lengths(i)) for i in range(len(prompts))]
    pairs = list(zip(prompts, options, strict=True))
    serial = [engine.submit(p, o).result(300).tokens for p, o in pairs]
    together = [engine.submit(p, o) for p, o in pairs]
    backwards = [engine.submit(p, o) for p, o in pairs[::-1]][::-1]
    assert serial == alone
    assert [r.result(300).tokens for r in together] == alone
    assert [r.result(300).tokens for r in backwards] == alone
    after = engine.stats()
    assert after.finished - before.finished == 3 * len(prompts)
    assert after.tokens - before.tokens == 3 * sum(map(len, alone))
    assert after.steps - before.steps < after.tokens - before.tokens  # rows share steps
    assert after.queued == after.running == 0


def test_an_answer_says_what_it_cost(engine, prompts, alone) -> None:
    request = engine.submit(prompts[1], Options(max_new_tokens=lengths(1)))
    answer = request.result(60)
    assert answer.text == engine.model.processor.decode(alone[1]) == "".join(request)
    assert answer.prompt_tokens == len(prompts[1].input_ids)
    assert answer.completion_tokens == len(answer.tokens) == lengths(1)
    assert answer.finish_reason == "length"
    assert answer.prefill_seconds > 0 and answer.decode_seconds > 0 and answer.queue_seconds >= 0


def test_stop_tokens_end_an_answer(loaded, prompts) -> None:
    with mq.Engine(loaded, slots=2, context=256) as engine:
        expected = loaded.generate_prompts([prompts[0]], 20)
        answer = engine.submit(prompts[0], Options(max_new_tokens=20)).result(60)
    assert expected.stopped[0] and answer.finish_reason == "stop"
    assert answer.tokens == expected.tokens[0]


def test_new_options_compile_nothing(engine, prompts) -> None:
    prompt, programs = prompts[0], engine.model.generator.programs
    for request in [engine.submit(prompt, Options(max_new_tokens=n)) for n in (2, 9)]:
        request.result(60)  # two rows at once, then one
    compiled = programs.compiled
    options = [
        Options(2, 0.7, 5, 0.9, seed=3),
        Options(3, 1.3, seed=4, repetition_penalty=1.2),
        Options(4, presence_penalty=0.5, frequency_penalty=-0.3),
        Options(5, stop=("a", "b")),
    ]
    for request in [engine.submit(prompt, o) for o in options]:
        request.result(60)
    assert programs.compiled == compiled
    kinds = [key for key in programs.keys(engine.model.generator.owner) if "engine" in key[0]]
    # Float models always decode all rows.
    assert [key[-1] for key in kinds if key[0] == "engine step"] == [4]


def test_warm_requests_compile_nothing(loaded, prompts) -> None:
    programs = Programs()
    model = dataclasses.replace(
        loaded, _generator=Generator(loaded.module, (-1,), programs=programs)
    )
    listed: list[int] = []

    def progress(items, label):
        listed.append(len(items))
        return items

    with mq.Engine(model, slots=2, context=256, prefill_chunk=CHUNK) as engine:
        alive = engine.warm_up(prompt=200, picture=256, progress=progress)
        compiled = programs.compiled
        assert alive == len(programs) == listed[0] == compiled
        for request in [engine.submit(prompts[i], Options(3)) for i in (0, 4, 6, 1, 0)]:
            assert len(request.result(60).tokens) == 3
        assert programs.compiled == compiled
        fails("prompt is 0", lambda: engine.warm_up(prompt=0))


def test_draws_depend_on_the_seed_alone(engine, model, prompts) -> None:
    prompt, how = prompts[5], Options(16, temperature=1.5, top_k=50, top_p=0.95, seed=11)
    key = jax.random.key(11)
    expected = model.generate_prompts([prompt], 16, Sampling(1.5, 50, 0.95), key).tokens[0]
    alone = engine.submit(prompt, how).result(60).tokens
    beside = [engine.submit(p, Options(9, 0.8, repetition_penalty=1.5)) for p in prompts[:6]]
    again = engine.submit(prompt, how)
    other = engine.submit(prompt, dataclasses.replace(how, seed=12))
    unseeded = [engine.submit(prompt, dataclasses.replace(how, seed=None)) for _ in range(2)]
    assert alone == again.result(60).tokens == expected
    assert other.result(60).tokens != alone
    assert len({tuple(r.result(60).tokens) for r in unseeded}) == 2
    for request in beside:
        request.result(60)


def reference(model, prompt: Prompt, n: int, options) -> list[int]:
    """Greedy tokens with penalties in NumPy, each from a forward pass of the whole prompt."""
    ids: list[int] = []
    for _ in range(n):
        whole = dataclasses.replace(prompt, input_ids=[*prompt.input_ids, *ids])
        logits = np.array(jax.jit(lambda m, b: m(b))(model.module, model.collate([whole])))[0, -1]
        seen = sorted({*prompt.input_ids, *ids})
        factor = options.repetition_penalty
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / factor, logits[seen] * factor)
        for token in set(ids):
            logits[token] -= options.presence_penalty
            logits[token] -= options.frequency_penalty * ids.count(token)
        ids.append(int(logits.argmax()))
    return ids


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.5},
        {"frequency_penalty": 0.7, "presence_penalty": -1.0, "repetition_penalty": 1.1},
    ],
)
def test_penalties(engine, model, prompts, changes) -> None:
    options, prompt = Options(max_new_tokens=8, **changes), prompts[5]
    got = engine.submit(prompt, options).result(60).tokens
    assert got == reference(model, prompt, 8, options)


def test_stop_texts(engine, model, prompts, alone) -> None:
    prompt = prompts[5]
    whole = engine.submit(prompt, Options(max_new_tokens=24)).result(60).text
    stop = whole[5:8]
    request = engine.submit(prompt, Options(max_new_tokens=24, stop=("never", stop)))
    pieces = list(request)
    answer = request.result(0)
    assert answer.text == "".join(pieces) == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop" and answer.completion_tokens < 24
    text = engine.submit(prompt, Options(max_new_tokens=24, stop=whole + "!")).result(60).text
    assert text == whole  # a withheld partial match is emitted at the end


def test_streams_while_others_wait(engine, prompts) -> None:
    requests = [engine.submit(p, Options(max_new_tokens=12)) for p in prompts[:6]]
    texts: dict[int, str] = {}

    def read(i: int) -> None:
        texts[i] = "".join(requests[i])

    threads = [threading.Thread(target=read, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert texts == {i: r.result(0).text for i, r in enumerate(requests)}
    assert "".join(requests[0]) == texts[0]  # iterating again restarts


def test_cancelling(model, prompts) -> None:
    with mq.Engine(model, slots=1, context=600, prefill_chunk=CHUNK) as engine:
        running = engine.submit(prompts[0], Options(max_new_tokens=500))
        queued = engine.submit(prompts[1], Options(max_new_tokens=500))
        last = engine.submit(prompts[2], Options(max_new_tokens=3))
        next(iter(running))
        queued.cancel()
        assert queued.result(60).finish_reason == "cancelled" and queued.result().tokens == []
        assert not running.done
        running.cancel()
        answer = running.result(60)
        assert answer.finish_reason == "cancelled" and 0 < len(answer.tokens) < 500
        assert answer.text == "".join(running)
        assert last.result(60).finish_reason == "length"
        running.cancel()  # has no effect any more
        stats = engine.stats()
        assert (stats.cancelled, stats.finished, stats.running) == (2, 1, 0)


def test_a_cancelled_prefill_leaves_nothing(model, prompts, alone) -> None:
    long = max(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
    with mq.Engine(model, slots=2, context=700, prefill_chunk=CHUNK, reuse_bytes=0) as engine:
        for i in (0, 5, 1):
            cancelled = engine.submit(prompts[long])
            cancelled.cancel()
            answer = engine.submit(prompts[i], Options(max_new_tokens=lengths(i)))
            assert answer.result(60).tokens == alone[i]
            assert cancelled.result(60).finish_reason == "cancelled"


def test_what_is_refused(model, prompts) -> None:
    with mq.Engine(model, slots=1, context=600, queue=2) as engine:
        first = engine.submit(prompts[0], Options(max_new_tokens=500))
        next(iter(first))
        waiting = [engine.submit(prompts[0], Options(max_new_tokens=1)) for _ in range(2)]
        with pytest.raises(
            mq.QueueFull, match="2 requests are waiting, the engine's queue holds 2"
        ):
            engine.submit(prompts[0])
        first.cancel()
        engine.close(drain=True)
        assert all(r.result(0).finish_reason == "length" for r in waiting)
        fails("the engine is closed", lambda: engine.submit(prompts[0]))
    with mq.Engine(model, slots=1, context=64) as engine:
        answer = engine.submit(prompts[0], Options(max_new_tokens=1000)).result(60)
        assert answer.finish_reason == "length"
        assert len(answer.tokens) == 64 - len(prompts[0].input_ids)
        too_long = text_prompt([300] * 64)
        with pytest.raises(mq.PromptTooLong, match="prompt has 64 tokens, .* context is 64"):
            engine.submit(too_long)
        fails("outside the model's vocabulary", lambda: engine.submit(text_prompt([999])))
        fails("prompt 0: no tokens", lambda: engine.submit(text_prompt([])))
        fails("expected a Prompt", lambda: engine.submit("text"))  # type: ignore[arg-type]
        fails("expected RequestOptions", lambda: engine.submit(prompts[0], {}))  # type: ignore


def text_prompt(ids: list[int]) -> Prompt:
    return Prompt(ids, [], np.zeros((0, 0), np.float32))


def test_closing_without_draining(model, prompts) -> None:
    engine = mq.Engine(model, slots=1, context=600)
    requests = [engine.submit(p, Options(max_new_tokens=400)) for p in prompts[:3]]
    engine.close(drain=False)
    assert {r.result(0).finish_reason for r in requests} == {"cancelled"}
    with pytest.raises(ZeroDivisionError), mq.Engine(model, slots=1, context=600) as engine:
        request = engine.submit(prompts[0], Options(max_new_tokens=500))
        raise ZeroDivisionError
    assert request.result(0).finish_reason == "cancelled"


def test_reuse_changes_no_answer(model, prompts, alone) -> None:
    rounds = []
    with mq.Engine(model, slots=2, context=700, prefill_chunk=CHUNK) as engine:
        for _ in range(2):
            requests = [
                engine.submit(p, Options(max_new_tokens=lengths(i))) for i, p in enumerate(prompts)
            ]
            rounds.append([r.result(300).tokens for r in requests])
            stats = engine.stats()
    assert rounds == [alone, alone]
    assert stats.reused_tokens % CHUNK == 0 and stats.reused_tokens > 0
    assert stats.picture_hits > 0 and 0 < stats.kept_bytes <= 256 << 20


def test_a_later_turn_reads_only_what_is_new(model) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (200, 300, 3), np.uint8)
    first = model.processor.prompt("what is this? " * 12, [picture])
    second = dataclasses.replace(first, input_ids=[*first.input_ids, *first.input_ids[-30:]])
    other = model.processor.prompt("what is this? " * 12, [picture[::-1].copy()])
    with mq.Engine(model, slots=2, context=700, prefill_chunk=CHUNK) as engine:
        engine.submit(first, Options(4)).result(60)
        before = engine.stats()
        answer = engine.submit(second, Options(4)).result(60)
        stats = engine.stats()
        assert stats.reused_tokens - before.reused_tokens == len(first.input_ids) // CHUNK * CHUNK
        assert stats.picture_misses == before.picture_misses
        assert answer.tokens == model.generate_prompts([second], 4).tokens[0]
        answer = engine.submit(other, Options(4)).result(60)
        assert engine.stats().picture_misses == before.picture_misses + 1
        assert engine.stats().reused_tokens == stats.reused_tokens  # same ids, but another picture
        assert answer.tokens == model.generate_prompts([other], 4).tokens[0]


def test_what_is_kept_is_bounded(model, prompts) -> None:
    with mq.Engine(model, slots=2, context=700, prefill_chunk=CHUNK, reuse_bytes=1 << 19) as engine:
        for request in [engine.submit(p, Options(1)) for p in prompts]:
            request.result(60)
        assert 0 < engine.stats().kept_bytes <= 1 << 19
    with mq.Engine(model, slots=2, context=700, prefill_chunk=CHUNK, reuse_bytes=0) as engine:
        for request in [engine.submit(prompts[8], Options(1)) for _ in range(2)]:
            request.result(60)
        stats = engine.stats()
        assert (stats.kept_bytes, stats.picture_hits, stats.reused_tokens) == (0, 0, 0)


def test_a_failure_is_told_and_the_engine_goes_on(model, prompts, alone, monkeypatch) -> None:
    with mq.Engine(model, slots=2, context=700, prefill_chunk=CHUNK) as engine:
        programs = engine._rows.programs

        def broken(*args):
            monkeypatch.undo()
            raise MemoryError("out of memory")

        monkeypatch.setattr(programs, "step", broken)
        lost = engine.submit(prompts[0], Options(8))
        with pytest.raises(RuntimeError, match="the engine failed: out of memory"):
            lost.result(60)
        with pytest.raises(RuntimeError):
            list(lost)
        answer = engine.submit(prompts[1], Options(max_new_tokens=lengths(1))).result(60)
        assert answer.tokens == alone[1] and engine.stats().failed == 1


def test_generate_from_several_threads(loaded, prompts) -> None:
    model = dataclasses.replace(loaded, _generator=None)
    samples = read_samples(BUNDLED_HELDOUT, 6)
    expected = [loaded.generate(s.images, s.question, max_new_tokens=6) for s in samples]
    got: dict[int, str] = {}
    generators = set()

    def run(i: int) -> None:
        generators.add(id(model.generator))
        got[i] = model.generate(samples[i].images, samples[i].question, max_new_tokens=6)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(6)] == expected and len(generators) == 1
