"""Base classes of models, and the interface of a family.

The rest of the package uses families only through this module, their streams and weight rules.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mquant_jax.models.batch import Batch as Batch
from mquant_jax.models.batch import Prompt as Prompt
from mquant_jax.models.batch import longest as longest
from mquant_jax.models.config_keys import Tables, unknown_keys
from mquant_jax.models.rules import WeightRule
from mquant_jax.models.streams import Streams
from mquant_jax.nn.act_quant import VISUAL
from mquant_jax.nn.cache import KVCache
from mquant_jax.nn.decoder import Decoder
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.nn.deepstack import DeepFeatures, rows_of
from mquant_jax.nn.flow import EmbeddingCall, Flow, run
from mquant_jax.nn.params import dense_layers
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.stack import SCAN, Runner
from mquant_jax.nn.vit import Features, parts_of
from mquant_jax.recipe import Recipe
from mquant_jax.sections import check_rules


class Config(Protocol):
    """The part of a family's config object (a frozen dataclass) that the package uses."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def language(self) -> DecoderConfig: ...

    def __hash__(self) -> int: ...


class VLM(nnx.Module):
    """A vision module and a decoder. Families subclass it and set their vision module.

    ``vision(VisionInput, runner) -> [N, M, feature_width]`` returns the visual tokens of each row,
    and ``vision.tokens(P)`` is ``M`` (:class:`mquant_jax.nn.vit.ViT`). For a text-only family
    ``vision`` is ``None``, as in all its batches.
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
            check_rules(recipe.rules, layers)

    @property
    def feature_width(self) -> int:
        """Width of a visual token's features: the part that replaces its embedding, then the part
        that each of the tower's taps adds after a layer of the decoder."""
        taps = () if self.vision is None else self.vision.cfg.taps
        return self.language.cfg.hidden_size * (1 + len(taps))

    def visual(self, batch: Batch, runner: Runner = SCAN) -> jax.Array | None:
        """Visual features ``[N * M, feature_width]``, the rows that ``visual_index`` refers to."""
        if batch.vision is None or self.vision is None:
            return None
        return self.vision(batch.vision, runner).reshape(-1, self.feature_width)

    def visual_flow(self, batch: Batch) -> Flow[Features | None]:
        """The same as a flow, in parts ``[N, M, hidden]``."""
        if batch.vision is None or self.vision is None:
            return None
        return (yield from self.vision.flow(batch.vision))

    def embed(
        self, batch: Batch, runner: Runner = SCAN, visual: jax.Array | None = None
    ) -> jax.Array:
        """Merged embeddings ``[B, T, hidden]``: visual features replace placeholders.

        ``visual``: features, if already computed; by default those of :meth:`visual`.
        """
        return run(self.embed_flow(batch, self.parts(visual)), runner)

    def embed_flow(self, batch: Batch, visual: Features | None = None) -> Flow[jax.Array]:
        """:meth:`embed` as a flow."""
        visual = (yield from self.visual_flow(batch)) if visual is None else visual
        x = yield EmbeddingCall("language/embedding", self.language, batch.input_ids)
        if visual is None:
            return x
        rows = rows_of(parts_of(visual)[0], batch.visual_index)
        return jnp.where((batch.visual_index >= 0)[..., None], rows.astype(x.dtype), x)

    def parts(self, visual: jax.Array | None) -> Features | None:
        """Visual features ``[..., feature_width]`` in parts of the decoder's width."""
        if visual is None:
            return None
        return tuple(jnp.split(visual, visual.shape[-1] // self.language.cfg.hidden_size, axis=-1))

    def added(self, batch: Batch, visual: Features | None) -> DeepFeatures | None:
        """What visual features, in parts, add after layers of the decoder."""
        deep = () if visual is None else parts_of(visual)[1:]
        return DeepFeatures(deep, batch.visual_index) if deep else None

    def stream(self, batch: Batch, runner: Runner = SCAN) -> jax.Array:
        """Residual stream before the final norm, ``[B, T, hidden]``; no cache."""
        return run(self.stream_flow(batch), runner)

    def stream_flow(self, batch: Batch) -> Flow[jax.Array]:
        """The same as a flow."""
        visual = yield from self.visual_flow(batch)
        x = yield from self.embed_flow(batch, visual)
        classes = self.language.classes(batch.input_ids, batch.order, batch.token_class)
        layout = {**_layout(batch, visual), "added": self.added(batch, visual)}
        return (yield from self.language.flow(x, batch.positions, batch.order, classes, **layout))

    def __call__(self, batch: Batch, runner: Runner = SCAN) -> jax.Array:
        """Logits at every position, float32 ``[B, T, vocab]``; no cache."""
        return run(self.flow(batch), runner)

    def flow(self, batch: Batch) -> Flow[jax.Array]:
        """:meth:`__call__` as a flow."""
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
        """Run prompts and fill the cache.

        Args:
            fresh: whether the cache is empty; otherwise the prompts continue its contents.
            visual: features, if already computed; by default those of :meth:`visual`.

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
        visual = self.visual(batch) if visual is None else visual
        classes = self.language.classes(batch.input_ids, batch.order, batch.token_class)
        x, cache = self.language.step(
            self.embed(batch, visual=visual), batch.positions, batch.order, classes, cache,
            fresh=fresh, added=self.added(batch, self.parts(visual)), **_layout(batch, visual),
        )  # fmt: skip
        # Break ties to the right: a masked token shares the order of the real token before it.
        last = batch.order.shape[1] - 1 - jnp.argmax(batch.order[:, ::-1], axis=1)
        return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0], cache

    def decode(
        self, tokens: jax.Array, order: jax.Array, position: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Run one more token per row. Generated tokens have the class and positions of text.

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
    """Arguments that tell the decoder where visual tokens are; empty without pictures."""
    slots = batch.visual_slots if pictures is not None else 0
    return {"visual_slots": slots, "visual": batch.token_class == VISUAL}


@runtime_checkable
class Processor(Protocol):
    """Turns pictures and text into a :class:`Batch`, and tokens into text."""

    def prompt(self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Prompt:
        """Apply the chat template and preprocess the pictures."""

    def messages(
        self,
        messages: Sequence[Any],
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
    ) -> Prompt:
        """A conversation, to be continued by the assistant."""

    def chat(self, messages: Sequence[Any]) -> Prompt:
        """The same for messages that contain their pictures; their texts are literal."""

    def continued(self, prompt: Prompt, text: str) -> Prompt:
        """The prompt followed by the beginning of an answer."""

    def collate(self, prompts: Sequence[Prompt], *, pad_to: int | None = None) -> Batch:
        """Left-pad prompts and pack their pictures into one :class:`Batch`."""

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, without special tokens."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """Sampling options in the model's files: ``temperature``, ``top_k``, ``top_p`` and
        ``repetition_penalty``."""

    def vocabulary_warning(self) -> str | None:
        """A warning about tokenizer ids outside the model's vocabulary, or ``None``."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything that defines a model family; one per ``model_type``.

    Attributes:
        name: the family's name in this package.
        config_from_hf: Hugging Face config dictionary -> the family's :class:`Config`, the argument
            of all other callables here.
        model: the family's :class:`VLM`.
        weight_rules: ``config -> rules``.
        ignored: whether a checkpoint tensor of this name is known and not needed.
        unused: ``(config, name)``: the same, depending on the config.
        processor_class: ``module:Class`` of its :class:`Processor`, which takes a folder and the
            config. Imported on first use: converting and verifying weights do not need it.
        reference_batch: ``(config, arrays of a golden's inputs) -> Batch``.
        example_prompt: ``(config, text tokens, picture side in pixels) -> Prompt``: arbitrary
            content of the given size, for measurements; without a picture if the side is 0 or the
            family is text-only.
        collate: ``(config, prompts) -> Batch`` without a tokenizer.
        streams: ``config -> Streams``, for fusing norms and rotating.
        config_tables: Hugging Face config dictionary -> the schema of each of its objects.
        canonical_name: a name in a checkpoint -> the name that the rules use (str -> str).
        pictures: whether prompts may have pictures; ``False`` for text-only models, which cannot
            use the bundled calibration set.
        most_pictures: maximum number of pictures per prompt; ``None``: no limit.
        videos: whether prompts may have videos.
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
        """The model with newly initialised weights."""
        return self.model(config, recipe, dtype, rngs=rngs)

    def unknown_keys(self, hf_config: dict[str, Any]) -> list[str]:
        """Keys of a config.json that no schema lists, with the paths of their objects."""
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
    """The model's structure with shapes instead of arrays, which takes no memory at any size.

    Raises:
        ValueError: the recipe does not fit the shapes.
    """
    return nnx.merge(*_structure(family, config, recipe, jnp.dtype(dtype)), copy=True)


@lru_cache(maxsize=16)
def _structure(family: Family, config: Config, recipe: Recipe, dtype) -> tuple[Any, Any]:
    """Graph and state of the model; a conversion asks for the same ones several times."""
    return nnx.split(nnx.eval_shape(lambda: family.build(config, recipe, dtype, nnx.Rngs(0))))


def with_head(config: Config, tied: bool) -> Config:
    """The config with a tied or untied head."""
    language = dataclasses.replace(config.language, tied_head=tied)
    return dataclasses.replace(config, language=language)
