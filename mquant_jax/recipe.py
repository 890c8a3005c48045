"""Recipes: what is quantised and how, as a tree of frozen dataclasses that maps to JSON.

A recipe is stored with every checkpoint. Together with the model's config it determines the shapes
of all tensors. Presets are in :mod:`mquant_jax.presets`.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar

from mquant_jax.errors import UserError
from mquant_jax.recipe_fields import read
from mquant_jax.sections import SECTIONS, Rule, Section, section_name
from mquant_jax.validate import shown

VERSION = 2  # of the JSON format; version 1 had no rules and no embedding section


@dataclasses.dataclass(frozen=True)
class Weights:
    """How weights are rounded.

    Attributes:
        method: ``gptq``, or ``rtn`` (round to nearest).
        clip: search the per-channel clip of least error before rounding.
        inputs: whether GPTQ uses the inputs of the ``quantised`` or of the ``float`` model.
        act_order: GPTQ rounds the columns with the largest inputs first.
        asymmetry: fraction (0 to 1) of the difference between the float and the quantised model's
            inputs that GPTQ compensates (GPTAQ).
        refit: rounds of fitting the scales to the integers, by the layer's output error, and then
            rounding again.
        visual_weight, sink_weight: weight of a visual token and of a sink in the Hessians of the
            language model; a text token has 1.
    """

    method: str = "rtn"
    clip: bool = True
    inputs: str = "quantised"
    act_order: bool = True
    asymmetry: float = 0.0
    refit: int = 0
    visual_weight: float = 1.0
    sink_weight: float = 1.0

    @property
    def needs_float_inputs(self) -> bool:
        return self.method == "gptq" and (self.asymmetry > 0 or self.inputs == "float")


@dataclasses.dataclass(frozen=True)
class Split:
    """Rotation magnitude suppression (RMS, paper section 3.3). A rotation gathers the mean of the
    weights of an MLP's last layer in one input channel. That channel is computed separately, so
    that it does not determine the scale of the others.

    Attributes:
        criterion: when to split: ``none``: never; ``paper``: if the channel's weights exceed all
            others in their rows; ``measured``: if it lowers the layer's output error.
        bits: bits of the channel's weights, which have their own scale: 4, 8, or 16 for float.
    """

    criterion: str = "none"
    bits: int = 8

    @property
    def wanted(self) -> bool:
        return self.criterion != "none"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How static scales are calibrated.

    Attributes:
        observer: ``minmax``; ``percentile`` (99.99 %); ``mse``, the clip with the least squared
            rounding error; or ``output``, the clip with the least error in the layers' outputs.
        headroom: factor on the clip. Later activations may exceed those of a small calibration
            set, and clipping them costs more than a coarser step.
        max_samples: maximum number of calibration samples.
    """

    observer: str = "minmax"
    headroom: float = 1.0
    max_samples: int = 128


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Learned scales: the language model's scales and gains are trained; its integers stay.

    Attributes:
        epochs: passes over the calibration prompts; 0 disables learning.
        rate: initial learning rate of Adam, relative to the parameters' size; decays to zero.
        act_rate: the same for activation scales. They start from the largest calibrated value,
            which may be far from the best one.
    """

    epochs: int = 0
    rate: float = 1e-3
    act_rate: float = 2e-2
    form: str = "model"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A complete recipe.

    Attributes:
        name: the preset's name, or the user's.
        vision, connector, language, head, embedding: one :class:`Section` each. A tied head shares
            the token embedding, which is then quantised like the head.
        rules: exceptions for some layers, see :class:`~mquant_jax.sections.Rule`; the first that
            matches a layer's path changes its section. ``(pattern, changes)`` is accepted.
        weights: see :class:`Weights`.
        modality_scales: separate static scales for visual and text tokens in the language model
            (MSQ, paper section 3.1) instead of a shared scale.
        sink_class: a separate scale for sinks, the few tokens with massive activations, which
            calibration finds.
        prefix_sinks: number of these tokens to put before every prompt. The checkpoint holds their
            keys and values, computed once by the float model (PrefixQuant).
        smooth: first move activation outliers into the weights (SmoothQuant), with a strength
            searched per layer.
        balance: equalise channels whose size is free, before the rotation
            (:mod:`mquant_jax.ptq.balance`).
        rotate: fold norms and sign-randomised Hadamard rotations into the weights (paper section
            3.2), with an online rotation before every MLP's last layer.
        orthogonal: random orthogonal matrices instead of Hadamard matrices for rotations that cost
            nothing at run time.
        online_signs: random signs in online rotations, which spread what a plain Hadamard matrix
            gathers in one channel; ``False`` is the paper's method.
        online_reads: rotate online the inputs of layers that read a residual stream which cannot be
            rotated (in a post-norm tower).
        split: see :class:`Split`.
        seed: seed of the rotations' signs.
        calibration: see :class:`Calibration`.
        tune: see :class:`Tuning`.
    """

    name: str = "float"
    vision: Section = Section()
    connector: Section = Section()
    language: Section = Section()
    head: Section = Section()
    embedding: Section = Section()
    rules: tuple[Rule, ...] = ()
    weights: Weights = Weights()
    modality_scales: bool = True
    sink_class: bool = False
    prefix_sinks: int = 0
    smooth: bool = False
    balance: bool = False
    rotate: bool = False
    orthogonal: bool = False
    online_signs: bool = True
    online_reads: bool = True
    split: Split = Split()
    seed: int = 0
    calibration: Calibration = Calibration()
    tune: Tuning = Tuning()
    version: ClassVar[int] = VERSION

    def __post_init__(self):
        object.__setattr__(self, "rules", tuple(map(Rule.of, self.rules)))

    @property
    def class_groups(self) -> tuple[tuple[int, ...], ...]:
        """Token classes (text, visual, sink) that share a static scale, group by group."""
        return {
            (False, False): ((0, 1, 2),),
            (True, False): ((0, 2), (1,)),
            (False, True): ((0, 1), (2,)),
            (True, True): ((0,), (1,), (2,)),
        }[self.modality_scales, self.sink_class]

    @property
    def marks_sinks(self) -> bool:
        """Whether the model has to mark sinks."""
        return self.sink_class and any(s.activations == "static" for s in self._of("language"))

    @property
    def finds_sinks(self) -> bool:
        """Whether calibration has to find sinks."""
        return self.marks_sinks or self.prefix_sinks > 0

    @property
    def n_classes(self) -> int:
        """Entries in the language model's tables of static scales."""
        return 3 if len(self.class_groups) > 1 else 1

    @property
    def online_seed(self) -> int | None:
        """Seed of the online rotations' signs."""
        return self.seed if self.online_signs else None

    def section(self, name: str) -> Section:
        return getattr(self, name)

    def section_for(self, path: str) -> Section:
        """The section of a dense layer or table: ``language/layers/3/down_proj``,
        ``language/embedding``. A tied table has the head's path."""
        section, rule = self.section(section_name(path)), self.rule_for(path)
        return section if rule is None else rule.applied(section)

    def rule_for(self, path: str) -> Rule | None:
        """The rule that applies to a layer, if any."""
        return next((rule for rule in self.rules if rule.matches(path)), None)

    def _of(self, *names: str) -> list[Section]:
        """All sections that layers of these parts may have, with one rule or none."""
        own = list(map(self.section, names))
        return own + [rule.applied(section) for rule in self.rules for section in own]

    @property
    def changes_weights(self) -> bool:
        """Whether the checkpoint's tensors differ from the source's."""
        return (
            self.rotate
            or self.smooth
            or self.balance
            or any(s.quantised or s.activations != "none" for s in self._of(*SECTIONS))
        )

    @property
    def learns(self) -> bool:
        """Whether scales are learned after rounding."""
        return self.tune.epochs > 0 and any(s.quantised for s in self._of("language"))

    @property
    def learns_whole(self) -> bool:
        """Whether scales are learned at the end, for the whole model."""
        return self.learns and self.tune.form == "model"

    @property
    def learns_blocks(self) -> bool:
        """Whether scales are learned block by block."""
        return self.learns and self.tune.form == "block"

    @property
    def carries_float(self) -> bool:
        """Whether the float model's activations are needed as well as the quantised model's."""
        return self.weights.needs_float_inputs or self.learns_blocks

    @property
    def needs_calibration(self) -> bool:
        layers = self._of(*(name for name in SECTIONS if name != "embedding"))
        gptq = self.weights.method == "gptq" and any(s.quantised for s in layers)
        weights = gptq or self.smooth or self.balance or self.split.wanted or self.learns
        return weights or self.prefix_sinks > 0 or any(s.activations == "static" for s in layers)

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        fields = dataclasses.asdict(self) | {"rules": [rule.to_json() for rule in self.rules]}
        return {"version": VERSION, **json.loads(json.dumps(fields))}

    @classmethod
    def from_json(cls, data: dict[str, Any], origin: str = "recipe") -> Recipe:
        """Build and check a recipe. Without a version it is read as version 1.

        Raises:
            UserError: an unknown key, value or version; the message names it and the allowed ones.
        """
        rules: Any = []
        if isinstance(data, dict):
            data = dict(data)
            version, rules = data.pop("version", 1), data.pop("rules", rules)
            if type(version) is not int or not 1 <= version <= VERSION:
                raise UserError(f"{origin}.version: {shown(version)} is not one of 1 to {VERSION}; "
                                "a newer mquant_jax may have written it")  # fmt: skip
        if not isinstance(rules, list | tuple):
            raise UserError(f"{origin}.rules: expected a list, found {shown(rules)}")
        made = [Rule.of(rule, f"{origin}.rules[{i}]") for i, rule in enumerate(rules)]
        return cls(**read(cls, data, origin), rules=tuple(made))

    def table(self) -> str:
        """The recipe as text, one line per section."""
        rows = ["section    weights  group  activations"]
        for name in SECTIONS:
            s = self.section(name)
            bits = f"int{s.w_bits}" if s.quantised else "float"
            rows.append(f"{name:<10} {bits:<8} {s.group_size or '-':<6} {s.activations}")
        rows += [f"{rule.pattern}: {dict(rule.changes)}" for rule in self.rules]
        how = f"weights by {self.weights.method}" if self.changes_weights else "as it was"
        turned = f", rotated (seed {self.seed})" if self.rotate else ", not rotated"
        rows.append(how + (turned if self.changes_weights else ""))
        return "\n".join(rows)
