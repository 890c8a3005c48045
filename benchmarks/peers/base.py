"""The interface of a peer, and helpers to build one."""

from __future__ import annotations

import abc
import dataclasses
import importlib
import importlib.util
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mquant_jax.eval.speed import Timings
from mquant_jax.nn.params import Params


class Peer(Protocol):
    """One way to run the model: batch 1, greedy.

    Attributes:
        settings: the chosen options, for the record.
        weight_bytes: the weights' size in memory; ``None`` if the runtime does not report it.
    """

    settings: str
    weight_bytes: int | None

    def prefill(self, tokens: Sequence[int]) -> None:
        """Clear the cache, run a prompt, and choose the first token after it."""
        ...

    def decode(self, n: int) -> list[int]:
        """Generate ``n`` more tokens; return all tokens since the prompt, including the first."""
        ...


class TokenByToken(abc.ABC):
    """A peer that is called once for a prompt and once for each token after it."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    @abc.abstractmethod
    def clear(self) -> None:
        """Forget the prompt and all tokens after it."""

    @abc.abstractmethod
    def next_token(self, tokens: Sequence[int]) -> int:
        """Run tokens after the cached ones, and choose the next."""

    def prefill(self, tokens: Sequence[int]) -> None:
        self.clear()
        self.tokens = [self.next_token(tokens)]

    def decode(self, n: int) -> list[int]:
        for _ in range(n):
            self.tokens.append(self.next_token(self.tokens[-1:]))
        return self.tokens


@dataclasses.dataclass(frozen=True)
class Source:
    """The model that every peer runs.

    Attributes:
        family, config, params: our float32 model, its head tied.
        path: the GGUF file it comes from.
        calibration: text for static scales, as one batch.
        room: the largest number of tokens in prompt and answer together.
        new_tokens: number of tokens of the answer after the first.
        threads: number of threads to use.
    """

    family: Any
    config: Any
    params: Params
    path: Path
    calibration: Any
    room: int
    new_tokens: int
    threads: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Peers of one runtime.

    Attributes:
        names: the peers, in the table's order.
        module: module in ``benchmarks.peers`` whose ``build(source, names)`` yields the peers of
            these names one by one.
        packages: import names of required packages.
        install: how to install them.
    """

    names: tuple[str, ...]
    module: str
    packages: tuple[str, ...] = ()
    install: str = ""

    def missing(self) -> str | None:
        """Return why the group cannot run here and how to install what is missing, or ``None``."""
        absent = [p for p in self.packages if importlib.util.find_spec(p) is None]
        return f"{', '.join(absent)} not installed: {self.install}" if absent else None

    def build(self, source: Source, names: Sequence[str]) -> Iterator[tuple[str, Peer]]:
        """Build the peers of these names.

        Raises:
            ImportError: an installed package cannot be imported.
        """
        module = importlib.import_module(f"benchmarks.peers.{self.module}")
        return module.build(source, names)


def threads() -> int:
    """Return the number of cores that this process may run on; XLA uses as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Timed:
    """A peer with one prompt, to be timed."""

    def __init__(self, peer: Peer, prompt: Sequence[int], new_tokens: int):
        self.peer, self.prompt, self.new_tokens = peer, prompt, new_tokens
        self.timings = Timings()

    def run(self, record: bool) -> None:
        t0 = time.perf_counter()
        self.peer.prefill(self.prompt)
        t1 = time.perf_counter()
        self.peer.decode(self.new_tokens)
        t2 = time.perf_counter()
        if record:
            self.timings.prefill.append(t1 - t0)
            self.timings.decode.append(t2 - t1)


def continued(peer: Peer, prompt: Sequence[int], tokens: int) -> list[int]:
    """Return the peer's first ``tokens`` tokens after the prompt."""
    peer.prefill(prompt)
    return peer.decode(tokens - 1)


def share_equal(found: Sequence[int], expected: Sequence[int]) -> float:
    """Return the share of positions with equal tokens."""
    return float(np.mean(np.asarray(found) == np.asarray(expected)))


def hf_names(layers: int) -> dict[str, str]:
    """Return a Llama's tensor names in PyTorch -> ours."""
    leaves = {
        "input_layernorm": "attn_norm/weight",
        "post_attention_layernorm": "mlp_norm/weight",
        **{f"self_attn.{x}_proj": f"{x}_proj/kernel" for x in "qkvo"},
        **{f"mlp.{x}_proj": f"{x}_proj/kernel" for x in ("gate", "up", "down")},
    }
    names = {
        f"model.layers.{i}.{theirs}.weight": f"language/layers/{i}/{ours}"
        for i in range(layers)
        for theirs, ours in leaves.items()
    }
    names["model.norm.weight"] = "language/norm/weight"
    names["model.embed_tokens.weight"] = "language/embedding"
    return names
