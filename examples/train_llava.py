"""Train the connector of a small LLaVA, and low-rank updates of its language model.

The folder that ``python -m benchmarks.llava_folder BASE --untrained`` writes has a pretrained
vision tower and a pretrained language model, but the projector between them is random. This script
trains it on pictures with short questions (examples/llava_pictures.py), and small updates of the
language model with it; neither part's own weights change. Two CPU cores are enough. Run from the
repository root:

    python -m examples.train_llava BASE --out /tmp/llava --minutes 75 --emoji EMOJI

EMOJI is the npm package ``emoji-datasource-google`` 16.0.0, unpacked; without it, no emoji are
drawn. The tower's features of all pictures are computed once and kept in OUT. Training can be
stopped at any time; the same command continues from the last checkpoint. Progress goes to stderr
and to OUT/log.jsonl. The result is OUT/connector.safetensors, which goes to
``benchmarks.llava_folder OUT --connector``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from safetensors.numpy import save_file

from examples import low_rank
from examples.llava_data import Data, Model
from examples.llava_pictures import Picture, pictures
from examples.low_rank import Tree, times
from examples.train_demo import load_checkpoint, rate, save_checkpoint

PROJECTOR = "multi_modal_projector."


def fresh(model: Model, features: np.ndarray, rank: int, seed: int) -> tuple[Tree, Tree]:
    """Return trainable tensors, and mean and spread of the features, with which the projector's
    inputs are normalised."""
    rng, width, hidden = np.random.default_rng(seed), features.shape[-1], model.frozen["norm"].size
    spread = {"mean": features.mean((0, 1)), "std": features.std((0, 1)) + 1e-3}
    scale = float(jnp.std(model.frozen["embedding"].astype(jnp.float32)))
    w1 = rng.standard_normal((hidden, width)) / np.sqrt(width)
    w2 = rng.standard_normal((hidden, hidden)) / np.sqrt(hidden) * scale / 0.6
    projector = {"w1": w1, "b1": np.zeros(hidden), "w2": w2, "b2": np.zeros(hidden)}
    projector = {k: jnp.asarray(v, jnp.float32) for k, v in projector.items()}
    updates = low_rank.fresh_updates(model.frozen, rank, seed)
    return {"projector": projector, "updates": updates}, jax.tree.map(jnp.asarray, spread)


def visual(p: Tree, spread: Tree, features: jax.Array) -> jax.Array:
    """The projector: features ``[B, tokens, width]`` -> embeddings ``[B, tokens, hidden]``."""
    x = (features - spread["mean"]) / spread["std"]
    x = jax.nn.gelu(times(x, p["w1"]) + p["b1"], approximate=False)
    return times(x, p["w2"]) + p["b2"]


def front(model: Model, p: Tree, spread: Tree, frozen: Tree, features: jax.Array) -> jax.Array:
    """Embeddings of a picture and of what stands around it: ``[B, P, hidden]``."""
    x = visual(p, spread, features)
    ends = [frozen["embedding"][jnp.asarray(ids)].astype(jnp.float32) for ids in model.front]
    before, behind = (jnp.broadcast_to(e, (len(x), *e.shape)) for e in ends)
    return jnp.concatenate([before, x, behind], axis=1)


def answer_words(model: Model, drawn: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings ``[W, hidden]`` of the words that answer questions, and which of them
    answer one about each picture, bool ``[N, W]``; yes and no say nothing about a picture."""
    answers = [{w for _, a in p.questions for w in a.split()} - {"yes", "no"} for p in drawn]
    words = [w for w, n in Counter(w for a in answers for w in a).items() if n >= 20]
    table = np.asarray(model.frozen["embedding"], np.float32)
    rows = [table[model.processor.encode(f" {w}")].mean(0) for w in words]
    return np.stack(rows), np.asarray([[w in a for w in words] for a in answers])


def aligned(
    model: Model, p: Tree, spread: Tree, data: Data, drawn: Sequence[Picture], seed: int,
    steps: int = 300, size: int = 48,
) -> Tree:  # fmt: skip
    """Bring visual tokens close to the embeddings of words that answer questions about them.

    This needs no language model and costs a hundredth of what training through it does. Of each
    word some token should have its direction, and tokens should be as long as embeddings.
    """
    words, present = answer_words(model, drawn)
    length = np.linalg.norm(words, axis=1).mean()
    words = jnp.asarray(words / np.linalg.norm(words, axis=1, keepdims=True))
    start = np.log(present.mean(0) / (1 - present.mean(0)))
    tx, params = optimizer(), {"p": p, "bias": jnp.asarray(start - 15, jnp.float32)}

    def loss(params, features, there):
        x = visual(params["p"], spread, features)
        norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
        near = jax.nn.logsumexp(25 * times(x / norm, words), axis=1) + params["bias"]
        return (
            optax.sigmoid_binary_cross_entropy(near, there).mean()
            + 0.1 * ((norm / length - 1) ** 2).mean()
        )

    @jax.jit
    def step(params, state, features, there, lr):
        value, grads = jax.value_and_grad(loss)(params, features, there)
        changes, state = tx.update(grads, state, params)
        return jax.tree.map(lambda p, u: p - lr * u, params, changes), state, value

    state, rng = tx.init(params), np.random.default_rng(seed)
    for i in range(steps):
        which = np.sort(rng.choice(len(drawn), min(size, len(drawn)), replace=False))
        features = data.features[which].astype(np.float32)
        lr = rate(i / steps, i, 2e-3, 20)
        params, state, value = step(params, state, features, present[which].astype(np.float32), lr)
        if i % 50 == 49:
            print(f"alignment {i + 1}/{steps}: {float(value):.4f}", file=sys.stderr, flush=True)
    return params["p"]


def make_steps(model: Model, tx: optax.GradientTransformation) -> tuple[Any, Any]:
    """Return the jitted training step, and the one that says which answers are right."""

    def scores(params: Tree, frozen: Tree, spread: Tree, batch) -> jax.Array:
        features, ids, at, _ = batch
        x = front(model, params["projector"], spread, frozen, features)
        x = low_rank.stream(model.shape, frozen, params["updates"], x, ids)
        x = jnp.take_along_axis(x, jnp.maximum(at, 0)[..., None], axis=2)
        return low_rank.logits(model.shape, frozen, x)

    def loss(params: Tree, frozen: Tree, spread: Tree, batch) -> jax.Array:
        labels = batch[3]
        each = optax.softmax_cross_entropy_with_integer_labels(
            scores(params, frozen, spread, batch), jnp.maximum(labels, 0)
        )
        return jnp.where(labels >= 0, each, 0).sum() / (labels >= 0).sum()

    def step(params, state, frozen, spread, batch, lr):
        value, grads = jax.value_and_grad(loss)(params, frozen, spread, batch)
        changes, state = tx.update(grads, state, params)
        return jax.tree.map(lambda p, u: p - lr * u, params, changes), state, value

    def right(params, frozen, spread, batch):
        best, labels = scores(params, frozen, spread, batch).argmax(-1), batch[3]
        return ((best == labels) | (labels < 0)).all(-1)

    return jax.jit(step, donate_argnums=(0, 1)), jax.jit(right)


def optimizer() -> optax.GradientTransformation:
    """Return Adam without its learning rate, which the training loop applies."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.98))


def evaluate(right: Any, args: tuple[Any, ...], data: Data, size: int, asked: int) -> dict:
    """Return the exact match of greedy answers by kind of picture."""
    found: dict[str, list[float]] = {}
    for start in range(0, len(data.kinds) - size + 1, size):
        which = range(start, start + size)
        hits = np.asarray(right(*args, data.batch(which, asked, None)))
        for i, row in zip(which, hits, strict=True):
            found.setdefault(data.kinds[i], []).append(float(row.mean()))
    return {kind: round(float(np.mean(v)), 3) for kind, v in sorted(found.items())}


def connector(params: Tree, spread: Tree) -> dict[str, np.ndarray]:
    """Return the projector, its normalisation folded into it, and the low-rank factors, bfloat16
    under a checkpoint's names."""
    p = {k: np.asarray(v, np.float64) for k, v in params["projector"].items()}
    mean, std = (np.asarray(spread[k], np.float64) for k in ("mean", "std"))
    w1 = p["w1"] / std
    tensors = {
        f"{PROJECTOR}linear_1.weight": w1,
        f"{PROJECTOR}linear_1.bias": p["b1"] - w1 @ mean,
        f"{PROJECTOR}linear_2.weight": p["w2"],
        f"{PROJECTOR}linear_2.bias": p["b2"],
        **low_rank.named_updates(params["updates"]),
    }
    return {k: np.ascontiguousarray(v.astype(ml_dtypes.bfloat16)) for k, v in tensors.items()}


def train(args: argparse.Namespace) -> None:
    """Run the training loop; see ``--help`` for the options."""
    args.out.mkdir(parents=True, exist_ok=True)
    model, checkpoint = Model(args.base), args.out / "checkpoint.npz"
    drawn = pictures(args.pictures, "train", args.seed, args.emoji)
    data = Data(model, drawn, args.out / "train.npy")
    held_out = Data(
        model, pictures(args.held_out, "heldout", args.seed, args.emoji), args.out / "heldout.npy"
    )
    params, spread = fresh(model, data.features[:200].astype(np.float32), args.rank, args.seed)
    tx = optimizer()
    state, step, before = tx.init(params), 0, 0.0
    if not checkpoint.exists():
        params["projector"] = aligned(model, params["projector"], spread, data, drawn, args.seed)
    else:
        (params, state), meta = load_checkpoint(checkpoint, (params, state))
        step, before = int(meta["step"]), meta["seconds"]
    train_step, right = make_steps(model, tx)
    rng = np.random.default_rng((args.seed, step))
    began = time.monotonic()
    log = open(args.out / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115
    losses, order, written = [], [], time.monotonic()
    while True:
        seconds = before + time.monotonic() - began
        progress = seconds / (60 * args.minutes)
        if progress >= 1 or time.monotonic() - written > 60 * args.every:
            row: dict[str, Any] = {"step": step, "seconds": round(seconds)}
            row["loss"] = round(float(np.mean(losses)), 4) if losses else None
            row["exact"] = evaluate(
                right, (params, model.frozen, spread), held_out, args.batch, args.questions
            )
            save_checkpoint(checkpoint, (params, state), {"step": step, "seconds": seconds})
            save_file(connector(params, spread), str(args.out / "connector.safetensors"))
            for file in (log, sys.stderr):
                print(json.dumps(row), file=file, flush=True)
            losses, written = [], time.monotonic()
        if progress >= 1:
            return
        if len(order) < args.batch:
            order = rng.permutation(len(data.kinds)).tolist()
        which = [order.pop() for _ in range(args.batch)]
        lr = rate(progress, step, args.lr, 30)
        batch = data.batch(which, args.questions, rng)
        params, state, loss = train_step(params, state, model.frozen, spread, batch, lr)
        losses.append(float(loss))
        step += 1


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_llava",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("base", type=Path, help="the untrained folder")
    add("--out", type=Path, required=True, help="folder for features, checkpoint, log and result")
    add("--minutes", type=float, default=75, help="training time, earlier runs included")
    add("--emoji", type=Path, metavar="DIR", help="the unpacked npm package")
    add("--pictures", type=int, default=5000, help="to train on (default 5000)")
    add("--held-out", type=int, default=48, help="to evaluate on (default 48)")
    add("--batch", type=int, default=2, help="pictures per step (default 2)")
    add("--questions", type=int, default=8, help="per picture (default 8)")
    add("--rank", type=int, default=8, help="of the language model's updates (default 8)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    add("--every", type=float, default=4, help="minutes between evaluations (default 4)")
    add("--seed", type=int, default=0, help="of weights and data")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
