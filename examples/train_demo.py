"""Train a small Qwen2-VL from scratch on the demo tasks, and export it.

The result is a regular Hugging Face checkpoint of a few megabytes that can see, and two CPU cores
are enough to train it. Run from the repository root:

    python -m examples.train_demo --out /tmp/demo --minutes 90 --export demo_checkpoint

Training can be stopped at any time. The same command with --resume continues from the last
checkpoint. Progress goes to stderr and to OUT/log.jsonl, one JSON object per line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples import demo_tasks
from examples.demo_model import PLACE_CLASSES, Collator, Pair, export, hf_config
from examples.demo_pictures import CELL_CLASSES
from mquant_jax.checkpoint.plan import plan
from mquant_jax.checkpoint.source import Reader
from mquant_jax.models.base import Batch
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.qwen2_vl.modeling import Qwen2VL
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import set_params
from mquant_jax.nn.stack import Runner, num_layers, scan_tapped

WEIGHT_DECAY = 0.05


class Prefetch:
    """Draws training batches in a background thread; ``difficulty`` may change at any time."""

    def __init__(
        self, collate: Collator, batch_size: int, seed: tuple[int, ...], mix: dict[str, float]
    ) -> None:
        self.difficulty = 0.0
        self._queue: queue.Queue = queue.Queue(maxsize=4)
        self._args = (collate, batch_size, np.random.default_rng(seed), mix)
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        collate, size, rng, mix = self._args
        while True:
            try:
                item = collate(demo_tasks.batch(rng, size, "train", self.difficulty, mix))
            except Exception as error:  # re-raised in the training loop
                self._queue.put(error)
                return
            self._queue.put(item)

    def next(self) -> Pair:
        """Return the next batch and its targets."""
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item


def optimizer() -> optax.GradientTransformation:
    """Return AdamW without its learning rate, which the training loop applies."""

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim >= 2, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.98, eps=1e-8),
        optax.add_decayed_weights(WEIGHT_DECAY, mask=matrices),
    )


class Listener(Runner):
    """Runs the model as usual and keeps some of its activations.

    Attributes:
        visual: output of the vision tower, float ``[N, 9, hidden]``.
        stream: the residual stream before the last block, float ``[N, T, hidden]``.
    """

    visual: jax.Array
    stream: jax.Array

    def module(self, name: str, module: nnx.Module, x: Any, classes: jax.Array) -> Any:
        y = super().module(name, module, x, classes)
        if name == "vision/merger":
            self.visual = y
        return y

    def tapped(
        self, name: str, stack: nnx.Module, x: jax.Array, context: Any, taps: tuple[int, ...] = ()
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        if name != "language/layers":
            return super().tapped(name, stack, x, context, taps)
        x, (*outs, self.stream) = scan_tapped(stack, x, context, (*taps, num_layers(stack) - 2))
        return x, tuple(outs)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross-entropy of each label in nats, without reduction."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def hint_loss(head: Any, x: jax.Array, labels: jax.Array, classes: tuple[int, ...]) -> jax.Array:
    """Return the loss of a linear head that predicts several labels from each token.

    Label 0 is the class "none" and -1 is ignored. Each label's sum over all tokens is divided by
    the number of tokens with a class other than "none".
    """
    x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    scores = x @ head["kernel"] + head["bias"]
    total, start = 0.0, 0
    for i, size in enumerate(classes):
        label = labels[..., i]
        part = cross_entropy(scores[..., start : start + size], jnp.maximum(label, 0))
        total += jnp.where(label >= 0, part, 0.0).sum() / jnp.maximum(1, (label > 0).sum())
        start += size
    return total


def loss_fn(params: Any, graphdef: Any, batch: Batch, targets: dict[str, jax.Array], hint: float):
    """Return the mean cross-entropy over the answer, plus ``hint`` times three auxiliary losses.

    Two linear heads, used in training only, predict labels. The first predicts from each visual
    token where its cell is and what it shows. The vision tower knows only relative positions, and
    learns far more slowly without it. The second predicts from each question word that names an
    item where the item is, how it lies relative to the item named first, and what follows for the
    answer. Without it, the decoder does not learn to compare positions. For the third loss, the
    last tokens of a question predict the answer's first token, which helps to pass on what the
    question's words have found.

    Returns:
        The sum, and its parts: answers; early answers, cells, places.
    """
    listener = Listener()
    logits = nnx.merge(graphdef, params["model"])(batch, listener)
    weight = targets["answer"] >= 0
    loss = cross_entropy(logits, jnp.maximum(targets["answer"], 0))
    loss = (loss * weight).sum() / weight.sum()
    asked = targets["early"] >= 0
    early = cross_entropy(logits, jnp.maximum(targets["early"], 0))
    early = (early * asked).sum() / asked.sum()
    cells = hint_loss(params["cells"], listener.visual, targets["cells"], CELL_CLASSES)
    places = hint_loss(params["places"], listener.stream, targets["places"], PLACE_CLASSES)
    return loss + hint * (early + cells + places), (loss, early, cells, places)


def training_init(params: Any, config: dict[str, Any]) -> Any:
    """Rescale fresh weights so that training from scratch starts well.

    Weights that write into a residual stream shrink by ``1/sqrt(2 * layers)``. Token embeddings
    grow to the scale of the visual ones, which would otherwise dominate the first layers. A smaller
    final norm then keeps the scale of the tied head's logits.
    """
    depths = {"vision": config["vision_config"]["depth"], "language": config["num_hidden_layers"]}

    def scale(path: Any, p: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "embedding" in name:
            return p * 10.0
        if "language" in name and "norm" in name and p.ndim == 1:
            return p * 0.1
        if "merger" in name and "fc2" in name:
            return p * 0.4
        writes = p.ndim == 3 and any(part in name for part in ("o_proj", "fc2", "down_proj"))
        depth = depths["vision" if "vision" in name else "language"]
        return p * (2 * depth) ** -0.5 if writes else p

    return jax.tree_util.tree_map_with_path(scale, params)


def make_steps(graphdef: Any) -> tuple[Any, Any]:
    """Return the jitted ``train_step`` and ``exact`` (is the greedy answer right, one bool per
    row)."""
    tx = optimizer()

    def train_step(params, opt_state, batch, targets, lr, hint):
        grad_fn = jax.grad(loss_fn, has_aux=True)
        grads, losses = grad_fn(params, graphdef, batch, targets, hint)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = jax.tree.map(lambda p, u: p - lr * u, params, updates)
        return params, opt_state, losses

    def exact(params, batch, targets):
        # In a causal model, greedy decoding yields the target if and only if each target token is
        # the argmax given the true tokens before it.
        best, answer = nnx.merge(graphdef, params["model"])(batch).argmax(-1), targets["answer"]
        return ((best == answer) | (answer < 0)).all(-1)

    return jax.jit(train_step, donate_argnums=(0, 1)), jax.jit(exact)


def evaluate(
    exact: Any, params: Any, collate: Collator, samples: list[demo_tasks.Sample], size: int = 50
) -> dict[str, float]:
    """Return the exact match of greedy answers, over ``all`` and by task."""
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(samples) - size + 1, size):
        part = samples[start : start + size]
        for s, ok in zip(part, np.asarray(exact(params, *collate(part))), strict=True):
            right["all"].append(bool(ok))
            right[s.task].append(bool(ok))
    return {task: round(float(np.mean(oks)), 4) for task, oks in sorted(right.items())}


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path), leaf


def save_checkpoint(path: Path, tree: Any, meta: dict[str, float]) -> None:
    """Write all leaves and the metadata to one npz file, atomically."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, meta=json.dumps(meta), **{n: np.asarray(v) for n, v in _named(tree)})
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path, tree: Any) -> tuple[Any, dict[str, float]]:
    """Read a checkpoint into the structure of ``tree``."""
    with np.load(path, allow_pickle=False) as data:
        leaves = []
        for name, old in _named(tree):
            if name not in data or data[name].shape != old.shape:
                raise ValueError(
                    f"{path} has no {name} with shape {old.shape}; the checkpoint is of another "
                    "model, start without --resume"
                )
            leaves.append(jnp.asarray(data[name], old.dtype))
        meta = json.loads(str(data["meta"]))
    return jax.tree.unflatten(jax.tree.structure(tree), leaves), meta


def rate(progress: float, step: int, peak: float, warmup: int) -> float:
    """Return the learning rate: linear warm-up, then a cosine in ``progress`` down to 1 % of
    ``peak``."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * cosine)


def train(args: argparse.Namespace) -> None:
    """Run the training loop; see ``--help`` for the options."""
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.npz"
    config = hf_config()
    model_config = Qwen2VLConfig.from_hf(config)
    model = Qwen2VL(model_config, rngs=nnx.Rngs(args.seed))
    if args.init:
        start = Reader(args.init)
        todo = plan(family_for(start.config, args.init / "config.json"), model_config, start)
        set_params(model, {n: v.astype(np.float32) for n, v in todo.read(start).items()})
    graphdef, params = nnx.split(model)
    params = {"model": params if args.init else training_init(params, config)}
    for name, outputs in (("cells", sum(CELL_CLASSES)), ("places", sum(PLACE_CLASSES))):
        kernel = jnp.zeros((config["hidden_size"], outputs))
        params[name] = {"kernel": kernel, "bias": jnp.zeros(outputs)}
    opt_state = optimizer().init(params)
    train_step, exact = make_steps(graphdef)
    step, before = 0, 0.0
    if args.resume and checkpoint.exists():
        (params, opt_state), meta = load_checkpoint(checkpoint, (params, opt_state))
        step, before = int(meta["step"]), meta["seconds"]
    count = sum(p.size for p in jax.tree.leaves(params["model"]))
    print(f"{count / 1e6:.2f}M parameters, from step {step}", file=sys.stderr)

    collate = Collator()
    data = Prefetch(collate, args.batch_size, (args.seed, 0x7121, step), args.mix)
    held_out = demo_tasks.eval_set(args.eval_samples, seed=1)
    began = mark = time.monotonic()
    mark_step, losses = step, []
    log = open(args.out / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115
    while True:
        seconds = before + time.monotonic() - began
        progress = max(
            step / args.steps if args.steps else 0.0,
            seconds / (60 * args.minutes) if args.minutes else 0.0,
        )
        finished = progress >= 1
        data.difficulty = min(1.0, 0.1 + progress / args.ramp) if args.ramp else 1.0
        lr = rate(progress, step, args.lr, args.warmup)
        if losses and (finished or step % args.log_every == 0):
            mean_loss, *hints = np.mean(losses, axis=0)  # blocks until the device is done
            speed = (step - mark_step) * args.batch_size / (time.monotonic() - mark)
            row: dict[str, Any] = {
                "step": step,
                "seconds": round(seconds),
                "progress": round(progress, 4),
                "difficulty": round(data.difficulty, 3),
                "loss": round(float(mean_loss), 4),
                "hints": [round(float(x), 4) for x in hints],
                "lr": float(f"{lr:.3g}"),
                "samples_per_s": round(speed, 1),
            }
            if finished or step % args.eval_every == 0:
                row["exact"] = evaluate(exact, params, collate, held_out)
                save_checkpoint(checkpoint, (params, opt_state), {"step": step, "seconds": seconds})
            print(json.dumps(row), file=log, flush=True)
            print(json.dumps(row), file=sys.stderr, flush=True)
            losses, mark, mark_step = [], time.monotonic(), step
        if finished:
            break
        batch, targets = data.next()
        params, opt_state, loss = train_step(params, opt_state, batch, targets, lr, args.hint)
        losses.append(loss)
        step += 1
    log.close()
    if args.export:
        export(nnx.merge(graphdef, params["model"]), args.export)
        print(f"exported to {args.export}", file=sys.stderr)


def task_mix(text: str) -> dict[str, float]:
    """Parse ``read=0.4,relation=0.6``."""
    mix = {}
    for part in text.split(","):
        task, _, weight = part.partition("=")
        if task not in demo_tasks.TRAIN_WEIGHTS:
            tasks = ", ".join(demo_tasks.TRAIN_WEIGHTS)
            raise argparse.ArgumentTypeError(f"unknown task {task!r}; choose from {tasks}")
        mix[task] = float(weight)
    return mix


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for checkpoint.npz and log.jsonl")
    add("--steps", type=int, help="stop after this many steps in total")
    add(
        "--minutes",
        type=float,
        help="stop after this much training time, resumed runs included; with --steps, "
        "whichever comes first. The learning rate decays until then",
    )
    add("--batch-size", type=int, default=64, help="samples per step (default 64)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    add("--warmup", type=int, default=300, help="steps of linear warm-up (default 300)")
    add(
        "--ramp",
        type=float,
        default=0.2,
        help="share of the run over which tasks reach full difficulty; 0: at once (default 0.2)",
    )
    add("--hint", type=float, default=0.5, help="weight of the auxiliary losses (default 0.5)")
    add("--seed", type=int, default=0, help="seed of the weights and of the data (default 0)")
    add("--init", type=Path, metavar="DIR", help="start from the weights of an exported folder")
    add(
        "--mix",
        type=task_mix,
        default=demo_tasks.TRAIN_WEIGHTS,
        metavar="TASK=SHARE,...",
        help="how often each task is drawn (default "
        + ",".join(f"{task}={share}" for task, share in demo_tasks.TRAIN_WEIGHTS.items())
        + ")",
    )
    add("--resume", action="store_true", help="continue from OUT/checkpoint.npz if it exists")
    add("--export", type=Path, metavar="DIR", help="write the Hugging Face folder here at the end")
    add("--eval-every", type=int, default=500, help="steps between evaluations (default 500)")
    add(
        "--eval-samples",
        type=int,
        default=250,
        help="held-out samples per evaluation (default 250)",
    )
    add("--log-every", type=int, default=50, help="steps between log lines (default 50)")
    args = parser.parse_args()
    if not args.steps and not args.minutes:
        parser.error("set the length of training: --steps N, --minutes M or both")
    if args.eval_every % args.log_every:
        parser.error("--eval-every must be a multiple of --log-every")
    train(args)


if __name__ == "__main__":
    main()
