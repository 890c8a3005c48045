"""The Python API: convert models, load checkpoints, generate answers."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mquant_jax.checkpoint.manifest import Verify
from mquant_jax.compile_cache import keep_compiled_programs
from mquant_jax.errors import PromptTooLong, UserError
from mquant_jax.models.base import VLM, Batch, Family, Processor, Prompt, longest
from mquant_jax.presets import resolve_recipe
from mquant_jax.recipe import Recipe
from mquant_jax.runtime.chats import Chats, chat_options
from mquant_jax.runtime.data_parallel import DataParallel
from mquant_jax.runtime.generate import Generation, Generator
from mquant_jax.runtime.options import Options, sampling_key
from mquant_jax.runtime.prompts import padded
from mquant_jax.runtime.sampling import Sampling
from mquant_jax.runtime.text_stream import TextStream
from mquant_jax.samples import Sample
from mquant_jax.validate import kind, listed, path

_MAKING = threading.RLock()  # reentrant: building one object may build another


@dataclasses.dataclass(repr=False)
class Model:
    """A loaded checkpoint. Thread-safe.

    Attributes:
        module: the Flax module; use it with :mod:`mquant_jax.runtime.generate` in JAX programs.
        config: the family's config object.
        manifest: contents of mquant.json.
        processor: turns pictures and text into batches, and tokens into text.
        layout: token layout of a prompt, see :class:`Generator`.
        kv_cache: ``float`` or ``int8``.
        family: the model family.
        devices: devices of this process to shard batches over; ``None``: only JAX's default. Set it
            before the first use.
    """

    module: VLM
    config: Any
    manifest: dict[str, Any]
    processor: Processor
    layout: str = "auto"
    kv_cache: str = "float"
    family: Family | None = None
    devices: Sequence[Any] | None = None
    _generator: Generator | None = None
    _chats: Chats | None = None

    def __repr__(self) -> str:
        name = self.family.name if self.family else type(self.module).__name__
        recipe = self.manifest.get("recipe", {}).get("name", "float")
        return f"Model({name}, recipe {recipe!r}, context of {self.max_positions} tokens)"

    @property
    def generator(self) -> Generator:
        """The compiled programs, created on first use and shared by all threads."""
        with _MAKING:
            if self._generator is None:
                how = (self.module, self.processor.stop_ids, self.layout, self.kv_cache)
                if self.devices is not None and len(self.devices) > 1:
                    self._generator = DataParallel(*how, devices=self.devices)
                else:
                    self._generator = Generator(*how)
            return self._generator

    @property
    def chats(self) -> Chats:
        """The engine of :meth:`chat`, created on first use."""
        with _MAKING:
            if self._chats is None:
                self._chats = Chats(self)
                weakref.finalize(self, self._chats.close)
            return self._chats

    @property
    def max_positions(self) -> int:
        return self.config.language.max_positions

    def collate(self, prompts: Sequence[Prompt]) -> Batch:
        """Collate prompts into one batch for your own programs. Prompts and pictures are padded to
        the sizes of :mod:`mquant_jax.runtime.buckets`, so that few programs are compiled.

        Raises:
            PromptTooLong: a prompt exceeds the context.
            PromptError: no prompts; token ids outside the vocabulary; or placeholders that do not
                match the pictures.
        """
        return padded(self.module, self._collate(prompts))

    def _collate(self, prompts: Sequence[Prompt]) -> Batch:
        tokens = longest(prompts)
        if tokens >= self.max_positions:
            raise PromptTooLong(
                f"prompt has {tokens} tokens, the model's context is {self.max_positions}: "
                "shorten the text or use smaller pictures"
            )
        return self.processor.collate(prompts)

    def generate(
        self,
        images: Sequence[Any] = (),
        prompt: str | Sequence[str] = "",
        *,
        videos: Sequence[Any] = (),
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        key: jax.Array | None = None,
        stream: Callable[[str], None] | None = None,
    ) -> str | list[str]:
        """Answer one prompt, or a batch of them.

        Args:
            images: for one prompt, its pictures, each of which is anything that
                :func:`mquant_jax.models.images.load_image` accepts (a path, PIL image, array,
                bytes, ...); for a list of prompts, one such list per prompt.
            prompt: the question, or a list of questions.
            videos: like ``images``; each video is a sequence of frames.
            max_new_tokens: maximum length of an answer, in tokens.
            temperature, top_k, top_p: see :class:`Sampling`; temperature 0 is greedy.
            key: sampling key, default ``jax.random.key(0)``.
            stream: called with each new piece of text (one prompt only).

        Returns:
            The answer, or a list of answers.

        Raises:
            ImageError: a picture cannot be read, or ``images`` is not a list.
            PromptTooLong: a prompt exceeds the context.
            UserError: placeholders that do not match the pictures, or a bad option.
        """
        options = Options(max_new_tokens, Sampling(temperature, top_k, top_p))
        single = isinstance(prompt, str)
        if stream is not None and not (single and callable(stream)):
            raise UserError("stream works with one prompt, not with a batch, and is a function "
                            "of the new text")  # fmt: skip
        made = self._prompts(prompt, images, videos)
        out = self.generate_prompts(made, options.max_new_tokens, options.sampling, key, stream)
        answers = [self.processor.decode(ids) for ids in out.tokens]
        return answers[0] if single else answers

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Callable[[str], None] | None = None,
        **options: Any,
    ) -> str:
        """Answer a conversation.

        Texts are literal: special tokens and picture placeholders in them are tokenized as plain
        characters. To place pictures by placeholder, use :meth:`generate`.

        Args:
            messages: ``{"role": ..., "content": text or parts}``, as in transformers; a part is
                ``{"type": "text", "text": ...}``, ``{"type": "image", "image": picture}``
                (anything that :func:`mquant_jax.models.images.load_image` accepts) or, if the
                family supports videos, ``{"type": "video", "video": frames}``; see
                :func:`mquant_jax.models.chat_media.take_media`.
            stream: called with each new piece of text.
            options: those of :class:`mquant_jax.runtime.requests.RequestOptions`. Defaults are 512
                new tokens, and sampling as in the model's generation_config.json.

        Raises:
            ImageError: a picture cannot be read; URLs are not downloaded.
            PromptTooLong: the conversation fills the context and leaves no token for an answer.
            UserError: a malformed message, or a bad option.
        """
        if stream is not None and not callable(stream):
            raise UserError(f"stream: expected a function of the new text, found {kind(stream)}")
        asked = chat_options(self.processor, options)
        request = self.chats.submit(self.processor.chat(messages), asked)
        try:
            if stream is not None:
                for text in request:
                    stream(text)
            return request.result().text
        finally:
            request.cancel()  # if the caller stops waiting

    def warm_up(
        self,
        *,
        batch: int = 1,
        prompt_tokens: int = 512,
        picture_patches: int = 1024,
        new_tokens: int = 128,
        progress: Callable[[Iterable, str], Iterable] = lambda items, label: items,
    ) -> int:
        """Compile the programs for requests up to these sizes ahead of the first request.

        Args:
            batch: prompts per batch.
            prompt_tokens: tokens of the longest prompt, including those of its pictures.
            picture_patches: patches of the largest picture; in most families a patch is 14 x 14
                pixels.
            new_tokens: tokens of the longest answer.
            progress: wraps the list of programs, for example in a progress bar.

        Returns:
            The number of programs alive in the process, at most
            :data:`mquant_jax.runtime.programs.LIMIT`.
        """
        return self.generator.warm_up(
            rows=batch,
            prompt=min(prompt_tokens, self.max_positions),
            picture=picture_patches,
            new_tokens=new_tokens,
            progress=progress,
        )

    def _prompts(self, prompt: Any, images: Any, videos: Any) -> list[Prompt]:
        """The prompts of one call of :meth:`generate`."""
        if isinstance(prompt, str):
            return [self.processor.prompt(prompt, images, videos)]
        if not isinstance(prompt, list | tuple) or not prompt:
            raise UserError("prompt: expected text, or a list of texts, at least one; found "
                            f"{kind(prompt)}")  # fmt: skip
        n = len(prompt)
        pictures = listed(images, "images", "lists of pictures", ndim=5) or [()] * n
        clips = listed(videos, "videos", "lists of clips", ndim=6) or [()] * n
        if not n == len(pictures) == len(clips):
            raise UserError(
                f"{n} prompts but {len(pictures)} lists of images and {len(clips)} of videos"
            )
        made = []
        for i, given in enumerate(zip(prompt, pictures, clips, strict=True)):
            try:
                made.append(self.processor.prompt(*given))
            except UserError as e:
                raise type(e)(f"prompt {i}: {e}") from e
        return made

    def generate_prompts(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        how: Sampling = Sampling(),
        key: jax.Array | None = None,
        stream: Callable[[str], None] | None = None,
    ) -> Generation:
        """Like :meth:`generate`, for processed prompts; returns ids and timings.

        Raises:
            UserError: see :meth:`collate`; or a bad option.
        """
        options = Options(max_new_tokens, how)
        key = sampling_key(key)
        batch = self._collate(prompts)
        limit = min(options.max_new_tokens, self.max_positions - longest(prompts))
        if stream is None:
            return self.generator.generate(batch, limit, options.sampling, key)
        text = TextStream(self.processor.decode)

        def emit(piece: str) -> None:
            if piece:
                stream(piece)

        def on_tokens(tokens: np.ndarray) -> None:
            if (token := int(tokens[0])) not in self.generator.stop_ids:
                emit(text.push(token))

        out = self.generator.generate(batch, limit, options.sampling, key, on_tokens)
        emit(text.end())
        return out


def load(
    folder: str | Path,
    dtype: Any = None,
    layout: str = "auto",
    kv_cache: str = "float",
    *,
    verify: Verify = True,
) -> Model:
    """Load a checkpoint written by ``python -m mquant_jax convert``.

    Args:
        folder: the checkpoint folder.
        dtype: dtype of everything that is not integer; default float32 on CPU (where bfloat16 is
            slower) and bfloat16 elsewhere.
        layout: ``auto``, ``masked`` or ``aifs``, see :class:`Generator`.
        kv_cache: ``float`` or ``int8``, the type of cached keys and values.
        verify: ``True``: every file must equal what the conversion wrote; ``"tensors"``: JSON files
            such as config.json may have been edited; ``False``: only file sizes are compared.

    Compiled programs are cached on disk for the next start, unless the user has configured or
    disabled JAX's compilation cache (:mod:`mquant_jax.compile_cache`). No other process-wide
    setting is changed.

    Raises:
        UserError: no such folder, not a checkpoint, an unknown format version, damaged or edited
            files, or a bad option.
    """
    options = Options(dtype=dtype, layout=layout, kv_cache=kv_cache)
    place = path(folder, "folder")
    from mquant_jax.loading import load_model

    keep_compiled_programs()
    loaded = load_model(place, options.dtype, verify=verify)
    processor = loaded.family.processor(place, loaded.config)
    return Model(
        loaded.model,
        loaded.config,
        loaded.manifest,
        processor,
        options.layout,
        options.kv_cache,
        loaded.family,
    )


def convert(
    src: str | Path,
    dst: str | Path,
    recipe: str | Path | Recipe = "float",
    calibration: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    restart: bool = False,
    budget: float | None = None,
) -> dict[str, Any]:
    """Convert a Hugging Face model folder to a checkpoint folder, part by part.

    Args:
        src: the folder, or a hub name in the local cache.
        dst: the folder to write; it appears when it is complete.
        recipe: a preset's name, the path of a JSON file, or a :class:`Recipe`.
        calibration: a JSONL file of samples; by default the bundled set.
        overwrite: replace the checkpoint at ``dst``.
        resume, restart: whether to continue from or remove ``DST.work``, which an interrupted
            conversion leaves.
        budget: mean stored bits per weight; bits and groups are first chosen for each layer that
            ``recipe`` gives 4 bits (docs/recipes.md).

    Returns:
        The manifest.

    Raises:
        UserError: bad input; ``dst`` is unchanged.
    """
    from mquant_jax.ptq.convert import convert

    keep_compiled_programs()
    return convert(
        path(src, "src"),
        path(dst, "dst"),
        recipe if isinstance(recipe, Recipe) else resolve_recipe(str(recipe)),
        None if calibration is None else path(calibration, "calibration"),
        overwrite,
        resume=resume,
        restart=restart,
        budget=budget,
    )


def quantize(
    model: Model,
    recipe: str | Path | Recipe,
    samples: str | Path | Sequence[Sample | Prompt] | None = None,
) -> Model:
    """Quantise a float model in memory; the float model stays usable.

    Args:
        model: a float model, from :func:`load`.
        recipe: a preset's name, the path of a JSON file, or a :class:`Recipe`.
        samples: calibration data: a JSONL file, :class:`~mquant_jax.samples.Sample` or ``Prompt``
            objects; by default the bundled set.

    Raises:
        UserError: the model is already quantised; bad samples or recipe.
    """
    from mquant_jax.ptq.quantize import quantize_model

    keep_compiled_programs()
    recipe = recipe if isinstance(recipe, Recipe) else resolve_recipe(str(recipe))
    family = model.family
    if family is None:
        raise UserError("model: expected a model from mq.load")
    module, config, report = quantize_model(
        model.module, model.config, family, model.processor, recipe, samples
    )
    manifest = {"family": family.name, "recipe": recipe.to_json(), "report": report}
    return dataclasses.replace(
        model, module=module, config=config, manifest=manifest, _generator=None, _chats=None
    )
