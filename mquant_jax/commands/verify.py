"""Check a checkpoint: its integrity, its source, and how far its outputs are from recorded ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mquant_jax.checkpoint.check import examine
from mquant_jax.cli_support import FAILED, OK, Parser, add_no_verify
from mquant_jax.compile_cache import keep_compiled_programs
from mquant_jax.errors import UserError
from mquant_jax.eval.reference import FLOAT_RTOL, verify_reference

EPILOG = """\
Without --reference, compares every file with its hash and the tensors' shapes with config.json and
recipe, and checks values: weight scales must be finite and positive, weights not all zero. --source
also compares the files of a model folder with those that the checkpoint was made from.

With --reference, runs the checkpoint in float32 on recorded inputs. DIR holds inputs.safetensors
and outputs.safetensors. The arrays found there are compared: vision (vision_pre, vision_conv),
embeds, hidden_i, logits and the greedy tokens, and the same for a second batch under text_*.
Padding is ignored. A rotated checkpoint uses another basis, so only its logits and greedy tokens
can be compared.

exit status: 0 ok, 1 a check failed or a tolerance was exceeded, 2 bad usage or input
"""


def _finite(value: Any) -> Any:
    """The value with NaN and Inf, which JSON lacks, as ``None``."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(result: dict[str, Any]) -> str:
    """The comparison as text."""
    rows = [f"{'array':<12} {'max abs':>10} {'relative':>10}  shape"]
    for name, a in result["arrays"].items():
        rows.append(f"{name:<12} {a['max_abs']:>10.2e} {a['rel']:>10.2e}  {a['shape']}")
    if result["other_basis"]:
        rows.append(f"not compared, because rotated:  {', '.join(result['other_basis'])}")
    if result["greedy_match"] is not None:
        rows.append(f"greedy tokens equal: {result['greedy_match']:.1%}")
    rows.append("ok" if result["ok"] else "FAILED")
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    """Print the result, as text or with ``--json`` as one object."""
    parser = Parser("python -m mquant_jax verify", __doc__ or "", EPILOG)
    add = parser.add_argument
    add("checkpoint", metavar="DST", type=Path, help="checkpoint folder")
    add("--source", metavar="DIR", type=Path, help="model folder that it was made from")
    add("--reference", metavar="DIR", type=Path, help="folder of recorded inputs and outputs")
    add("--rtol", type=float, help="largest relative error of an array (default: "
        f"{FLOAT_RTOL} for float checkpoints, no limit for quantised ones)")  # fmt: skip
    add_no_verify(parser)
    add("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    if args.reference is None and (args.rtol is not None or not args.verify):
        raise UserError("--rtol and --no-verify need --reference")
    keep_compiled_programs()
    result: dict[str, Any] = {"ok": True}
    if args.reference is None or args.source is not None:
        misfits = examine(args.checkpoint, args.source)
        result = {"ok": not misfits, "misfits": misfits}
    if args.reference is not None and result["ok"]:
        result |= verify_reference(args.checkpoint, args.reference, args.rtol, args.verify)
    print(json.dumps(_finite(result)) if args.json else text(result))
    return OK if result["ok"] else FAILED


def text(result: dict[str, Any]) -> str:
    """The result of the checks as text."""
    lines = list(result.get("misfits", ()))
    if "arrays" in result:
        return "\n".join([*lines, table(result)])
    return "\n".join([*lines, "ok" if result["ok"] else "FAILED"])
