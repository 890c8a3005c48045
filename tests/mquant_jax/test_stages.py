"""Stages of a long run: events for listeners, and log lines."""

from __future__ import annotations

import logging

import pytest

from mquant_jax.stages import listening, stage


def test_stages(caplog) -> None:
    heard: list[tuple[str, float]] = []

    @stage("decorated")
    def run() -> int:
        return 3

    with caplog.at_level(logging.INFO, "mquant_jax.stages"):
        with listening(lambda name, seconds: heard.append((name, seconds))):
            assert run() == 3 == run()
            with pytest.raises(ValueError), stage("fails"):
                raise ValueError
        with stage("unheard"):
            pass
    assert [name for name, _ in heard] == ["decorated", "decorated", "fails"]
    assert all(seconds >= 0 for _, seconds in heard)
    assert [r.message.split(":")[0] for r in caplog.records] == [
        "decorated", "decorated", "fails", "unheard",
    ]  # fmt: skip
