"""What every model is made of, and what a family must bring.

The rest of the package knows families through this module, their streams and weight rules.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mquant_jax.errors import PromptError
from mquant_jax.models.config_keys import Tables, unknown_keys
from mquant_jax.models.rules import WeightRule
from mquant_jax.models.streams import Streams
from mquant_jax.nn.act_quant import VISUAL
from mquant_jax.nn.cache import KVCache
from mquant_jax.nn.decoder import Decoder
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.nn.flow import EmbeddingCall, Flow, run
from mquant_jax.nn.params import dense_layers
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.stack import SCAN, Runner
from mquant_jax.nn.vit import VisionInput
from mquant_jax.numerics import AnyArray
from mquant_jax.recipe import Recipe
from mquant_jax.sections import check_rules


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["input_ids", "order", "positions", "token_class", "visual_index", "vision"],
    meta_fields=["visual_slots"],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of prompts, padded on the left to one length ``T``.

    Attributes:
        input_ids: int32 ``[B, T]``.
        order: int32 ``[B, T]``, 0, 1, 2, ... for real tokens and -1 for padding. A masked token
            inside a prompt (class -1 too) has the order of the real token before it: it is not
            seen, but sees.
        positions: int32 ``[streams, B, T]``, rotary positions.
        token_class: int32 ``[B, T]``: 0 text, 1 visual, -1 padding.
        visual_index: int32 ``[B, T]``, the row of the (flattened) visual features that replaces a
            token's embedding; -1: the token keeps its own.
        vision: the pictures, or ``None`` for text alone.
        visual_slots: columns before this one hold visual tokens and padding only, the others
            hold none (AIFS, ``runtime/tokens.py``); ``None``: they stand as they were written.
    """

    input_ids: AnyArray
    order: AnyArray
    positions: AnyArray
    token_class: AnyArray
    visual_index: AnyArray
    vision: VisionInput | None
    visual_slots: int | None = None

    @property
    def next_position(self) -> jax.Array:
        """int32 ``[B]``: the rotary position of the first generated token."""
        return jnp.max(jnp.where(self.token_class >= 0, self.positions, -1), axis=(0, 2)) + 1

    @property
    def lengths(self) -> jax.Array:
        """int32 ``[B]``: real tokens per row."""
        return jnp.max(self.order, axis=1) + 1


class Config(Protocol):
    """What the package needs of a family's config object, a frozen dataclass: the decoder's."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def language(self) -> DecoderConfig: ...


class VLM(nnx.Module):
    """A vision module in front of a decoder. Families subclass it and name their vision module.

    ``vision(VisionInput, runner) -> [N, M, hidden]`` gives the visual tokens of each row, and
    ``vision.tokens(P)`` is ``M`` (:class:`mquant_jax.nn.vit.ViT`). A family
    without pictures names none: ``vision`` stays ``None``, as in all its batches.
    """

    VISION: ClassVar[Callable[..., Any] | None] = None  # (config, recipe, dtype, rngs=)
    vision: Any = None  # a module with ``flow(VisionInput)``
    language: Decoder

    def __init__(
        self,
        config: Config,
        recipe: Recipe | None = None,
        dtype=jnp.float32,
        *,
        rngs: nnx.Rngs,
    ):
        """
        Raises:
            UserError: the recipe's rules do not fit the model.
        """
        recipe = recipe or Recipe()
        self.config = config
        if self.VISION is not None:
            self.vision = self.VISION(config, recipe, dtype, rngs=rngs)
        place = Placement.of(recipe, "language", dtype)
        self.language = Decoder(config.language, place, rngs=rngs)
        if recipe.rules:
            layers = dense_layers(self)
            check_rules(recipe.rules, {path: recipe.section_for(path) for path in layers})

    def visual(self, batch: Batch, runner: Runner = SCAN) -> jax.Array | None:
        """Visual features ``[N * M, hidden]``, which ``visual_index`` counts."""
        return run(self.visual_flow(batch), runner)

    def visual_flow(self, batch: Batch) -> Flow[jax.Array | None]:
        """The same as a flow."""
        if batch.vision is None or self.vision is None:
            return None
        features = yield from self.vision.flow(batch.vision)
        return features.reshape(-1, features.shape[-1])

    def embed(
        self, batch: Batch, runner: Runner = SCAN, visual: jax.Array | None = None
    ) -> jax.Array:
        """Merged embeddings ``[B, T, hidden]``: visual tokens take the place of placeholders.

        ``visual``: features computed before; by default :meth:`visual`.
        """
        return run(self.embed_flow(batch, visual), runner)

    def embed_flow(self, batch: Batch, visual: jax.Array | None = None) -> Flow[jax.Array]:
        """The same as a flow."""
        visual = (yield from self.visual_flow(batch)) if visual is None else visual
        x = yield EmbeddingCall("language/embedding", self.language, batch.input_ids)
        if visual is None:
            return x
        index = batch.visual_index
        return jnp.where((index >= 0)[..., None], visual[index].astype(x.dtype), x)

    def stream(self, batch: Batch, runner: Runner = SCAN) -> jax.Array:
        """Residual stream before the final norm, ``[B, T, hidden]``; no cache."""
        return run(self.stream_flow(batch), runner)

    def stream_flow(self, batch: Batch) -> Flow[jax.Array]:
        """The same as a flow."""
        x = yield from self.embed_flow(batch)
        classes = self.language.classes(batch.input_ids, batch.order, batch.token_class)
        return (
            yield from self.language.flow(
                x, batch.positions, batch.order, classes, **_layout(batch, batch.vision)
            )
        )

    def __call__(self, batch: Batch, runner: Runner = SCAN) -> jax.Array:
        """Logits of every position, float32 ``[B, T, vocab]``; no cache."""
        return run(self.flow(batch), runner)

    def flow(self, batch: Batch) -> Flow[jax.Array]:
        """The same as a flow."""
        x = yield from self.stream_flow(batch)
        return (yield from self.language.logits_flow(x, batch.token_class))

    def prefill(
        self,
        batch: Batch,
        cache: KVCache,
        *,
        fresh: bool = True,
        visual: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Put prompts into the cache.

        Args:
            fresh: the cache is empty; else the prompts go on from what it holds.
            visual: features computed before; by default :meth:`visual`.

        Returns:
            Logits of each row's last token, float32 ``[B, vocab]``, and the cache.
        """
        hidden, cache = self.read(batch, cache, fresh=fresh, visual=visual)
        return self.language.logits(hidden), cache

    def read(
        self,
        batch: Batch,
        cache: KVCache,
        *,
        fresh: bool = True,
        visual: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """:meth:`prefill` without the head: each row's last hidden state, ``[B, hidden]``."""
        classes = self.language.classes(batch.input_ids, batch.order, batch.token_class)
        x, cache = self.language.step(
            self.embed(batch, visual=visual), batch.positions, batch.order, classes, cache,
            fresh=fresh, **_layout(batch, batch.vision if visual is None else visual),
        )  # fmt: skip
        # Break ties to the right: a masked token shares the order of the real token before it.
        last = batch.order.shape[1] - 1 - jnp.argmax(batch.order[:, ::-1], axis=1)
        return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0], cache

    def decode(
        self, tokens: jax.Array, order: jax.Array, position: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """One more token per row; generated tokens are text, in class as in position.

        Args:
            tokens, order, position: int32 ``[B]``; all position streams agree on text.

        Returns:
            Logits float32 ``[B, vocab]``, and the cache.
        """
        streams = self.language.cfg.position_streams
        x = self.language.embed(tokens[:, None])
        positions = jnp.broadcast_to(position[None, :, None], (streams, tokens.shape[0], 1))
        x, cache = self.language.step(
            x, positions, order[:, None], jnp.zeros_like(tokens)[:, None], cache, visual_slots=0
        )
        return self.language.logits(x[:, 0]), cache


def _layout(batch: Batch, pictures: Any) -> dict[str, Any]:
    """What a decoder is told of where visual tokens stand; nowhere, without pictures."""
    slots = batch.visual_slots if pictures is not None else 0
    return {"visual_slots": slots, "visual": batch.token_class == VISUAL}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt made ready for a model: token ids with placeholders, and its pictures.

    Attributes:
        input_ids: token ids, visual placeholders already repeated once per visual token. Where no
            id is set aside for them, families use a number that is no id.
        grids: ``(t, h, w)`` patches of each picture or clip, in order of appearance.
        patches: float32 ``[sum(t*h*w), patch_dim]``.
        seconds: of each picture or clip, the time from one temporal patch to the next, for
            families whose positions follow time; empty: one second.
    """

    input_ids: list[int]
    grids: list[tuple[int, int, int]]
    patches: np.ndarray
    seconds: Sequence[float] = ()


def longest(prompts: Any) -> int:
    """Tokens of the longest prompt.

    Raises:
        PromptError: no sequence of prompts, none at all, or one without tokens.
    """
    if not isinstance(prompts, Sequence) or not prompts:
        raise PromptError("prompts: expected a list of Prompt objects, one at least")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt):
            raise PromptError(f"prompt {i}: expected a Prompt, found {type(prompt).__name__}; "
                              "make it with the processor's prompt()")  # fmt: skip
        if len(prompt.input_ids) == 0:
            raise PromptError(f"prompt {i}: no tokens; a model needs one at least")
    return max(len(prompt.input_ids) for prompt in prompts)


@runtime_checkable
class Processor(Protocol):
    """From pictures and text to a :class:`Batch`, and from tokens back to text."""

    def prompt(self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Prompt:
        """Apply the chat template and preprocess the pictures."""

    def messages(
        self,
        messages: Sequence[Any],
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
    ) -> Prompt:
        """A whole conversation, answered next by the assistant."""

    def chat(self, messages: Sequence[Any]) -> Prompt:
        """The same of messages that hold their pictures, whose texts are nothing but text."""

    def continued(self, prompt: Prompt, text: str) -> Prompt:
        """The prompt followed by the beginning of its answer."""

    def collate(self, prompts: Sequence[Prompt], *, pad_to: int | None = None) -> Batch:
        """Left-pad prompts and pack their pictures into one :class:`Batch`."""

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, no special tokens added."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, special tokens removed."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """How the model's files have tokens drawn: ``temperature``, ``top_k``, ``top_p`` and
        ``repetition_penalty``."""

    def vocabulary_warning(self) -> str | None:
        """What a conversion says of a tokenizer with ids that the model does not have."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything a model family brings; one per ``model_type``.

    Attributes:
        name: our name of the family.
        config_from_hf: Hugging Face config dictionary -> the family's :class:`Config`, which all
            other callables here are given.
        model: the family's :class:`VLM`.
        weight_rules: ``config -> rules``.
        ignored: whether a checkpoint tensor of this name is known and not needed.
        unused: ``(config, name)``: the same, as the config decides.
        processor_class: ``module:Class`` of its :class:`Processor`, made from a folder and the
            config. Imported on first use: weights convert and verify without it.
        reference_batch: ``(config, arrays of a golden's inputs) -> Batch``.
        example_prompt: ``(config, text tokens, picture side in pixels) -> Prompt``: arbitrary
            content of the asked size, for measurements; side 0 leaves the picture out, and so
            does a family without pictures.
        collate: ``(config, prompts) -> Batch`` without a tokenizer.
        streams: ``config -> Streams``, for fusing norms and rotating.
        config_tables: Hugging Face config dictionary -> the table of each of its objects.
        canonical_name: a name in a checkpoint -> the name that the rules use (str -> str).
        pictures: whether prompts may hold pictures; ``False`` for language models alone, which
            cannot use the bundled calibration set.
        most_pictures: pictures that one prompt may hold; ``None``: any number.
        videos: whether prompts may hold videos.
    """

    name: str
    config_from_hf: Callable[[dict], Config]
    model: type[VLM]
    weight_rules: Callable[[Any], list[WeightRule]]
    ignored: Callable[[str], bool]
    processor_class: str
    reference_batch: Callable[[Any, dict[str, np.ndarray]], Batch]
    example_prompt: Callable[[Any, int, int], Prompt]
    collate: Callable[[Any, Sequence[Prompt]], Batch]
    streams: Callable[[Any], Streams]
    config_tables: Callable[[dict], Tables]
    canonical_name: Callable[[str], str] = str
    pictures: bool = True
    most_pictures: int | None = None
    videos: bool = False
    unused: Callable[[Any, str], bool] = lambda config, name: False

    def build(self, config: Config, recipe: Recipe | None, dtype, rngs: nnx.Rngs) -> VLM:
        """The model with fresh weights."""
        return self.model(config, recipe, dtype, rngs=rngs)

    def unknown_keys(self, hf_config: dict[str, Any]) -> list[str]:
        """Keys of a config.json that no table names, with the paths of their objects."""
        return unknown_keys(self.config_tables(hf_config))

    def check_processor(self, folder: Path, config: Config) -> None:
        """See :func:`mquant_jax.models.trial.try_processor`."""
        from mquant_jax.models.trial import try_processor

        try_processor(self, folder, config)

    def processor(self, folder: str | Path, config: Config) -> Processor:
        """The processor of a checkpoint folder."""
        module, _, name = self.processor_class.partition(":")
        return getattr(importlib.import_module(module), name)(folder, config)


def abstract_model(family: Family, config: Config, recipe: Recipe, dtype=jnp.float32) -> VLM:
    """The model's structure with shapes in place of arrays: costs no memory at any size.

    Raises:
        ValueError: shapes and recipe do not fit together.
    """
    return nnx.eval_shape(lambda: family.build(config, recipe, dtype, nnx.Rngs(0)))


def with_head(config: Config, tied: bool) -> Config:
    """A family's config whose head is the embedding, or is not."""
    language = dataclasses.replace(config.language, tied_head=tied)
    return dataclasses.replace(config, language=language)
