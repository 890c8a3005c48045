"""The comparison with other runtimes, with fakes: selection, skips, interleaving, table."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from benchmarks.peers import ours
from benchmarks.peers.__main__ import GROUPS, OURS, chosen, compare, gather, table
from benchmarks.peers.base import Group, Source, hf_names, share_equal
from mquant_jax.errors import UserError
from mquant_jax.models.llama.processing import collate, text_prompt
from mquant_jax.nn.params import get_params
from tests.helpers import golden_model


class Fake:
    """Returns a fixed answer and logs each run."""

    settings = "none"

    def __init__(self, name: str, answer: list[int], log: list[str], weight_bytes: int | None = 8):
        self.name, self.answer, self.log, self.weight_bytes = name, answer, log, weight_bytes

    def prefill(self, tokens) -> None:
        self.log.append(f"{self.name} {len(tokens)}")

    def decode(self, n: int) -> list[int]:
        return self.answer[: n + 1]


@pytest.fixture
def result():
    log: list[str] = []
    answers = {"float32": [1, 2, 3, 4], OURS: [1, 2, 3, 5], "other": [1, 9, 9, 9]}
    peers = {n: Fake(n, a, log, None if n == "other" else 8) for n, a in answers.items()}
    rows, ratios = compare(peers, prompt=[0] * 5, question=[0] * 2, new_tokens=3, repeats=2)
    return {"rows": rows, "ratios": ratios, "log": log}


def test_everyone_takes_turns(result) -> None:
    question = ["float32 2", "w4a8 2", "other 2"]
    turn = ["float32 5", "w4a8 5", "other 5"]
    assert result["log"] == question + 3 * turn  # one warm-up run


def test_answers_are_held_against_the_float_model(result) -> None:
    assert [r["equal_tokens"] for r in result["rows"]] == [1.0, 0.75, 0.25]
    assert all(len(r["prefill_repeats"]) == len(r["decode_repeats"]) == 2 for r in result["rows"])


def test_ratios_are_their_time_over_ours(result) -> None:
    kinds = {f"{part}_vs_{name}" for part in ("prefill", "decode") for name in ("float32", "other")}
    assert set(result["ratios"]) == kinds
    rows = {r["variant"]: r for r in result["rows"]}
    for part in ("prefill", "decode"):
        ours, theirs = (rows[n][f"{part}_repeats"] for n in (OURS, "other"))
        by_hand = sorted(t / o for t, o in zip(theirs, ours, strict=True))
        assert result["ratios"][f"{part}_vs_other"] == pytest.approx(sum(by_hand) / 2)


def test_table_has_every_peer_and_what_is_left_out(result) -> None:
    head = {"prompt_tokens": 5, "new_tokens": 3, "threads": 1, "machine": {"processor": "x"}}
    lines = table(head | result | {"skipped": {"absent": "no such package"}}).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["float32", OURS, "other"]
    assert lines[3].split().count("1.00") == 2  # our ratio to ourselves
    assert lines[4].split()[1] == "-"  # bytes unknown
    assert lines[4].endswith("25%")
    assert lines[5] == "left out absent: no such package"


def test_float_and_ours_always_run() -> None:
    (first, names), (second, others) = chosen(GROUPS, ["torch-int8"])
    assert (first.module, names) == ("ours", ["float32", OURS])
    assert (second.module, others) == ("torch_hf", ["torch-int8"])
    assert [names for _, names in chosen(GROUPS, None)] == [list(g.names) for g in GROUPS]
    with pytest.raises(UserError, match="--peer nobody: expected one of float32, w4a8"):
        chosen(GROUPS, ["nobody"])


def test_missing_packages_are_named_with_the_way_to_get_them(capsys) -> None:
    group = Group(("a", "b"), "never_imported", ("no_such_package",), "pip install it")
    peers, skipped = gather([(group, ["a", "b"])], None)
    assert peers == {}
    assert skipped == dict.fromkeys("ab", "no_such_package not installed: pip install it")
    assert "left out a, b: no_such_package not installed" in capsys.readouterr().err


def test_a_package_that_does_not_load_is_left_out_too(monkeypatch, capsys) -> None:
    def build(source, names):
        yield "a", Fake("a", [], [])
        raise ImportError("libfoo.so is gone")

    module = types.SimpleNamespace(build=build)
    monkeypatch.setitem(sys.modules, "benchmarks.peers.broken", module)
    peers, skipped = gather([(Group(("a", "b"), "broken", (), "repair it"), ["a", "b"])], None)
    assert list(peers) == ["a"]
    assert skipped == {"b": "cannot be imported (libfoo.so is gone): repair it"}
    assert "libfoo" in capsys.readouterr().err


def test_names_of_pytorch() -> None:
    names = hf_names(2)
    assert len(names) == 2 + 2 * 9
    assert names["model.layers.1.self_attn.o_proj.weight"] == "language/layers/1/o_proj/kernel"
    assert names["model.layers.0.post_attention_layernorm.weight"].endswith("0/mlp_norm/weight")


def test_share_of_equal_tokens() -> None:
    assert share_equal([1, 2, 3, 4], [1, 0, 3, 0]) == 0.5


def test_our_own_models_answer() -> None:
    family, model, config, _, _ = golden_model("llama/public")
    prompt = list(range(3, 11))
    source = Source(family, config, get_params(model), Path("unread.gguf"),
                    collate([text_prompt(prompt)]), 16, 4, 1)  # fmt: skip
    names = ("float32", OURS, "w4a8-dynamic")
    peers = dict(ours.build(source, names))
    assert tuple(peers) == names
    for peer in peers.values():
        peer.prefill(prompt)
        assert len(peer.decode(4)) == 5
    assert peers[OURS].weight_bytes < peers["float32"].weight_bytes
