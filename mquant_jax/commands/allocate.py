"""Choose bits and groups for each layer within a budget, and write them as a recipe."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from mquant_jax.cli_support import OK, Parser
from mquant_jax.errors import UserError
from mquant_jax.presets import resolve_recipe
from mquant_jax.ptq.budget import Choice, choose_for
from mquant_jax.sections import Section, kind_of

EPILOG = """\
Each layer that the recipe gives 4 bits gets 4 bits per channel, 4 bits in groups of 64, or 8 bits,
so that the sum of the layers' output errors on the calibration data is least. The budget is the
mean of stored bits per weight, scales included, over all quantised layers and the head; the
embedding does not count. FILE is the recipe with one rule for each layer that differs.

examples:
  python -m mquant_jax allocate Qwen2-VL-2B-Instruct -o mixed.json --budget 5 --calibration my.jsonl
  python -m mquant_jax convert Qwen2-VL-2B-Instruct out/mixed --recipe mixed.json \\
      --calibration my.jsonl
"""


def _name(section: Section) -> str:
    return f"int{section.w_bits}" + (f" by {section.group_size}" if section.group_size else "")


def table(choice: Choice) -> str:
    """Format what each kind of layer got."""
    kinds: dict[str, Counter[str]] = {}
    for path, section in choice.sections.items():
        kinds.setdefault(kind_of(path), Counter())[_name(section)] += 1
    lines = [f"{'layer':<32} got"]
    for kind, got in sorted(kinds.items()):
        lines.append(f"{kind:<32} " + ", ".join(f"{name} x{n}" for name, n in got.most_common()))
    lines.append(
        f"{choice.bits:.3f} bits per weight; sum of relative squared errors "
        f"{choice.before:.4g} -> {choice.after:.4g}"
    )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Write the recipe; print a table, or with ``--json`` one object."""
    parser = Parser("python -m mquant_jax allocate", __doc__ or "", EPILOG)
    add = parser.add_argument
    add("src", metavar="SRC", help="folder of a Hugging Face model, or its name in the cache")
    add("-o", "--out", type=Path, required=True, metavar="FILE.json", help="the recipe to write")
    add("--budget", type=float, required=True, metavar="BITS", help="mean bits per weight")
    add("--recipe", default="w4a8", metavar="PRESET|FILE.json", help="to start from (default "
        "w4a8); its own rules stay")  # fmt: skip
    add("--calibration", type=Path, metavar="FILE.jsonl", help="samples to measure errors on "
        "(default: the bundled set)")  # fmt: skip
    add("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise UserError(f"--out {args.out}: exists already; choose another file")
    if not args.out.resolve().parent.is_dir():
        raise UserError(f"--out {args.out}: its folder does not exist")
    recipe = resolve_recipe(args.recipe)
    choice = choose_for(args.src, recipe, args.budget, args.calibration)
    text = json.dumps(choice.recipe.to_json(), indent=1)
    args.out.write_text(text + "\n", encoding="utf-8")
    if args.json:
        made = {path: [s.w_bits, s.group_size] for path, s in choice.sections.items()}
        print(json.dumps({"bits": choice.bits, "error_before": choice.before,
                          "error_after": choice.after, "layers": made}))  # fmt: skip
    else:
        print(table(choice))
        print(f"wrote {args.out}")
    return OK
