"""A part-by-part walk over a model with a tapped tower equals the forward pass, also resumed."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mquant_jax.lazy import lazy
from mquant_jax.models.base import abstract_model
from mquant_jax.nn.params import get_params
from mquant_jax.ptq.ledger import Ledger
from mquant_jax.ptq.states import States
from mquant_jax.ptq.walk import LAST, Walk, outputs
from mquant_jax.recipe import Recipe
from tests.helpers import golden_model, relative

CASE = "qwen3_vl/public_video"  # the tower's last layer is tapped as well
GAIN = 1.03  # applied to every part's output, as if rounding had changed it


class Stopped(Exception):
    pass


class Louder:
    """A visitor that scales every output by ``GAIN``, except the twin's.

    Attributes:
        visited: names of the visited parts.
        last: inputs of the last part, for the walk and for the twin, chunk by chunk.
    """

    def __init__(self, stop: str = ""):
        self.stop, self.visited, self.last = stop, [], {}

    def visit(self, part):
        if part.name == self.stop:
            raise Stopped
        self.visited.append(part.name)
        self.last = {"own": list(part.inputs), "twin": list(part.twin)}
        louder = (GAIN * x for x in outputs(part.module, part.inputs))
        return louder, outputs(part.module, part.twin)

    def record(self, name):
        return {}

    def restore(self, name, record):
        pass


class Remembering(Ledger):
    def __init__(self):
        self.records = {}

    def done(self, key):
        return self.records.get(key)

    def commit(self, key, record):
        self.records[key] = record


@pytest.fixture(scope="module")
def case():
    family, model, config, inputs, _ = golden_model(CASE)
    batch = jax.tree.map(np.asarray, family.reference_batch(config, inputs))
    expected = np.asarray(jax.jit(lambda m, b: m.language.norm(m.stream(b)))(model, batch))
    return abstract_model(family, config, Recipe()), lazy(get_params(model)), batch, expected


def walked(case, states: States, ledger: Ledger, visitor: Louder) -> Louder:
    model, params, batch, _ = case
    text = batch.__class__(
        batch.input_ids[:1], batch.order[:1], batch.positions[:, :1], batch.token_class[:1] * 0,
        np.full_like(batch.visual_index[:1], -1), None,
    )  # fmt: skip
    chunks = [batch, text, batch]  # one without pictures
    Walk("walk", model, params, chunks, states, ledger, twin=True).run(visitor)
    return visitor


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_each_side_has_its_own_deep_features(case, budget) -> None:
    _, _, batch, expected = case
    seen = walked(case, States(budget=budget), Ledger(), Louder()).last
    real = batch.token_class >= 0
    for chunk in (0, 2):
        twin, own = (np.asarray(seen[side][chunk][0])[real] for side in ("twin", "own"))
        assert relative(twin, expected[real]) < 1e-5
        assert relative(own, expected[real]) > 1e-3


@pytest.mark.parametrize(
    "stop",
    ["vision/layers/1", "vision/merger", "vision/deepstack_0", "vision/deepstack_2",
     "language/layers/0", "language/layers/2", LAST],
)  # fmt: skip
def test_a_stopped_walk_goes_on(case, stop, tmp_path) -> None:
    whole = walked(case, States(), Ledger(), Louder())
    ledger = Remembering()
    with pytest.raises(Stopped):
        walked(case, States(tmp_path / "s"), ledger, Louder(stop))
    rest = walked(case, States(tmp_path / "s"), ledger, Louder())
    assert rest.visited == whole.visited[whole.visited.index(stop) :]
    for side in ("own", "twin"):
        for one, other in zip(whole.last[side], rest.last[side], strict=True):
            np.testing.assert_allclose(one[0], other[0], rtol=1e-5, atol=1e-5)
    assert not list((tmp_path / "s").iterdir())
