"""What is quantised and how: one frozen dataclass tree, JSON both ways.

A recipe is stored with every checkpoint and, with the model's config, is enough to rebuild the
shapes of all its tensors. Presets are in :mod:`mquant_jax.presets`.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar

from mquant_jax.errors import UserError
from mquant_jax.recipe_fields import read
from mquant_jax.sections import SECTIONS, Rule, Section, section_name
from mquant_jax.validate import shown

VERSION = 2  # of the JSON form; 1 had no rules and no embedding section


@dataclasses.dataclass(frozen=True)
class Weights:
    """How weights are rounded.

    Attributes:
        method: ``gptq``, or ``rtn``: round to nearest.
        clip: search a per-channel clip of least error before rounding.
        inputs: GPTQ works with what the layers before deliver once they are ``quantised``, or
            with what they deliver in ``float``.
        act_order: GPTQ takes the columns with the largest inputs first.
        asymmetry: share (0 to 1) of the difference between the float model's inputs and the
            quantised model's that GPTQ makes up for (GPTAQ).
        refit: rounds in which the scales are fitted to the rounded integers, by the layer's output
            error, and the integers rounded anew.
        visual_weight, sink_weight: weight of a visual token and of a sink in the Hessians of the
            language model; text has 1.
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
    """Rotation magnitude suppression (RMS, paper section 3.3): the input channel of an MLP's last
    layer in which a rotation has gathered the weights' mean is computed apart, so that it does not
    set everybody's scale.

    Attributes:
        criterion: ``none``; ``paper``: where the channel's weights exceed all others of their
            rows; or ``measured``: where splitting lowers the layer's output error.
        bits: of the channel's weights, which have a scale of their own: 4, 8, or 16 for float.
    """

    criterion: str = "none"
    bits: int = 8

    @property
    def wanted(self) -> bool:
        return self.criterion != "none"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How static scales are found.

    Attributes:
        observer: ``minmax``; ``percentile`` (99.99 %); ``mse``, the clip with the least squared
            rounding error; or ``output``, the clip with the least error in the layers' outputs.
        headroom: factor on the clip: what the model meets later may be larger than what a small
            calibration set showed, and cutting it off costs more than a coarser step.
        max_samples: calibration samples used at most.
    """

    observer: str = "minmax"
    headroom: float = 1.0
    max_samples: int = 128


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Learned scales: the integers stay, the language model's scales and gains follow a gradient.

    Attributes:
        epochs: passes over the calibration prompts; 0 learns nothing.
        rate: Adam's first step, relative to the size of what is learned; it decays to zero.
        act_rate: the same for activation scales. The largest value that calibration showed is only
            where they start, and may be far from where they serve best.
    """

    epochs: int = 0
    rate: float = 1e-3
    act_rate: float = 2e-2
    form: str = "model"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The whole plan.

    Attributes:
        name: the preset's name, or the user's.
        vision, connector, language, head, embedding: one :class:`Section` each. A tied head is
            the token embedding, which is then quantised as the head is.
        rules: what is different in some layers, see :class:`~mquant_jax.sections.Rule`; the first
            that matches a layer's path changes its section. ``(pattern, changes)`` will do.
        weights: see :class:`Weights`.
        modality_scales: visual and text tokens have static scales of their own in the language
            model (MSQ, paper section 3.1) instead of one shared scale.
        sink_class: so have the few tokens whose activations are massive, which calibration finds.
        prefix_sinks: so many of those tokens, found by calibration, stand in front of every prompt:
            their keys and values, which the float model computes once, are part of the checkpoint
            (PrefixQuant).
        smooth: move activation outliers into the weights first (SmoothQuant), its strength
            searched per layer.
        balance: make channels even where their size is free, before they are rotated
            (:mod:`mquant_jax.ptq.balance`).
        rotate: fold norms and sign-randomised Hadamard rotations into the weights (paper section
            3.2), with an online rotation in front of every MLP's last layer.
        orthogonal: random orthogonal matrices instead of Hadamards where a rotation costs nothing
            at run time.
        online_signs: the online rotations have random signs, which spread what a plain Hadamard
            gathers in one channel; ``False`` is the paper's form.
        online_reads: layers that read a residual stream which takes no rotation (that of a
            post-norm tower) rotate it online.
        split: see :class:`Split`.
        seed: of the rotations' signs.
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
        """Whether the model has to know its sinks."""
        return self.sink_class and any(s.activations == "static" for s in self._of("language"))

    @property
    def finds_sinks(self) -> bool:
        """Whether calibration has to look for them."""
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
        """How one dense layer is quantised, or a table: ``language/layers/3/down_proj``,
        ``language/embedding``. A tied table has the head's path."""
        section, rule = self.section(section_name(path)), self.rule_for(path)
        return section if rule is None else rule.applied(section)

    def rule_for(self, path: str) -> Rule | None:
        """The rule that changes a layer's section, if one does."""
        return next((rule for rule in self.rules if rule.matches(path)), None)

    def _of(self, *names: str) -> list[Section]:
        """What layers of these sections may have, by one rule or by none."""
        own = list(map(self.section, names))
        return own + [rule.applied(section) for rule in self.rules for section in own]

    @property
    def changes_weights(self) -> bool:
        """Whether the checkpoint holds anything else than the source's tensors."""
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
        """Whether they are learned at the end, for the whole model."""
        return self.learns and self.tune.form == "model"

    @property
    def learns_blocks(self) -> bool:
        """Whether they are learned block by block."""
        return self.learns and self.tune.form == "block"

    @property
    def carries_float(self) -> bool:
        """Whether the float model's activations are needed beside the quantised model's."""
        return self.weights.needs_float_inputs or self.learns_blocks

    @property
    def needs_calibration(self) -> bool:
        layers = self._of(*(name for name in SECTIONS if name != "embedding"))
        gptq = self.weights.method == "gptq" and any(s.quantised for s in layers)
        weights = gptq or self.smooth or self.balance or self.split.wanted or self.learns
        return weights or self.prefix_sinks > 0 or any(s.activations == "static" for s in layers)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and strings: what a JSON file would give back."""
        fields = dataclasses.asdict(self) | {"rules": [rule.to_json() for rule in self.rules]}
        return {"version": VERSION, **json.loads(json.dumps(fields))}

    @classmethod
    def from_json(cls, data: dict[str, Any], origin: str = "recipe") -> Recipe:
        """Build and check a recipe. One without a version is read as the first.

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
        """The plan as lines of text, one per section."""
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
