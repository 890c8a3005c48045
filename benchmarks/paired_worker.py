"""One of the two processes of :mod:`benchmarks.paired`: times rounds of its own checkout on demand.

Runs with another checkout's ``benchmarks`` and ``mquant_jax`` on the path, and therefore uses only
what both have. For each line on stdin it answers with one line of JSON, seconds by variant:
``{"w4a8": [vision, prefill, decode], ...}``.
"""

import json
import sys

from benchmarks.speed import AIFS, FAMILY, OURS, SUITES, cut_model, example, random_model, recipes
from mquant_jax.eval.speed import _Variant
from mquant_jax.runtime.tokens import arrange


def main(suite_name: str, layers: int, new_tokens: int, names: list[str]) -> None:
    suite = SUITES[suite_name]
    config = cut_model(suite.model, layers)
    prompts, _ = example(config, suite.text_tokens, 448, 1)
    known = recipes(suite.float_type)
    # Visual tokens at the front are another layout for the same model.
    of = {name: OURS if name == AIFS else name for name in names}
    models = {
        name: random_model(FAMILY, config, *known[name]) for name in dict.fromkeys(of.values())
    }
    variants = {}
    for name, model in of.items():
        batch = arrange(prompts)[0] if name == AIFS else prompts
        variants[name] = _Variant(models[model], batch, new_tokens)
    for variant in variants.values():
        variant.run(record=False)
    print(json.dumps({}), flush=True)
    for _ in sys.stdin:
        for variant in variants.values():
            variant.run(record=True)
        seconds = {
            name: [part[-1] for part in (v.timings.vision, v.timings.prefill, v.timings.decode)]
            for name, v in variants.items()
        }
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split(","))
