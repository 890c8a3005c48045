"""The package's front door: load a converted checkpoint, ask it about pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from mquant_jax.compile_cache import keep_compiled_programs
from mquant_jax.errors import UserError
from mquant_jax.models.base import VLM, Batch, Processor, Prompt
from mquant_jax.runtime.generate import Generation, Generator
from mquant_jax.runtime.prompts import padded
from mquant_jax.runtime.sampling import Sampling


@dataclasses.dataclass
class Model:
    """A loaded checkpoint.

    Attributes:
        module: the Flax module; use it with :mod:`mquant_jax.runtime.generate` in JAX programs.
        config: the family's config object.
        manifest: what the checkpoint says of itself.
        processor: pictures and text to batches, tokens to text.
        layout: where visual tokens stand while a prompt runs, see :class:`Generator`.
        kv_cache: ``float`` or ``int8``.
    """

    module: VLM
    config: Any
    manifest: dict[str, Any]
    processor: Processor
    layout: str = "auto"
    kv_cache: str = "float"
    _generator: Generator | None = None

    @property
    def generator(self) -> Generator:
        """The compiled programs; made at first use."""
        if self._generator is None:
            self._generator = Generator(
                self.module, self.processor.stop_ids, self.layout, self.kv_cache
            )
        return self._generator

    @property
    def max_positions(self) -> int:
        return self.config.language.max_positions

    def collate(self, prompts: Sequence[Prompt]) -> Batch:
        """Prompts as one batch, for programs of your own: prompts and pictures are padded to the
        sizes of :mod:`mquant_jax.runtime.buckets`, so that few are compiled.

        Raises:
            UserError: a prompt does not fit the context.
        """
        return padded(self.module, self._collate(prompts))

    def _collate(self, prompts: Sequence[Prompt]) -> Batch:
        longest = max(len(p.input_ids) for p in prompts)
        if longest >= self.max_positions:
            raise UserError(
                f"prompt has {longest} tokens, the model's context is {self.max_positions}: "
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
            images: for one prompt, its pictures (paths, PIL images or uint8 ``[H, W, 3]``); for a
                list of prompts, one such list per prompt.
            prompt: the question, or a list of questions.
            videos: like ``images``; each video is a sequence of frames.
            max_new_tokens: the longest answer, in tokens.
            temperature, top_k, top_p: see :class:`Sampling`; temperature 0 is greedy.
            key: sampling key, default ``jax.random.key(0)``.
            stream: called with each new piece of text (one prompt only).

        Returns:
            The answer, or a list of answers.

        Raises:
            UserError: a picture that is none, placeholders and pictures that do not match, a
                prompt longer than the context, a bad option.
        """
        single = isinstance(prompt, str)
        texts = [prompt] if single else list(prompt)
        per_prompt = [images] if single else (list(images) or [()] * len(texts))
        clips = [videos] if single else (list(videos) or [()] * len(texts))
        if not len(texts) == len(per_prompt) == len(clips):
            raise UserError(
                f"{len(texts)} prompts but {len(per_prompt)} lists of images and "
                f"{len(clips)} of videos"
            )
        if stream is not None and not single:
            raise UserError("stream works with one prompt, not with a batch")
        prompts = [
            self.processor.prompt(t, i, v) for t, i, v in zip(texts, per_prompt, clips, strict=True)
        ]
        out = self.generate_prompts(
            prompts, max_new_tokens, Sampling(temperature, top_k, top_p), key, stream
        )
        answers = [self.processor.decode(ids) for ids in out.tokens]
        return answers[0] if single else answers

    def warm_up(
        self,
        *,
        batch: int = 1,
        prompt_tokens: int = 512,
        picture_patches: int = 1024,
        new_tokens: int = 128,
        progress: Callable[[Iterable, str], Iterable] = lambda items, label: items,
    ) -> int:
        """Compile before the first request what requests up to these sizes need.

        Args:
            batch: prompts at once.
            prompt_tokens: tokens of the longest prompt, its pictures' included.
            picture_patches: patches of the largest picture; a patch is 14 pixels square in most
                families.
            new_tokens: tokens of the longest answer.
            progress: wraps the list of programs, say as a progress bar.

        Returns:
            The number of compiled programs that the process holds;
            :data:`mquant_jax.runtime.programs.LIMIT` is the most.
        """
        return self.generator.warm_up(
            rows=batch,
            prompt=min(prompt_tokens, self.max_positions),
            picture=picture_patches,
            new_tokens=new_tokens,
            progress=progress,
        )

    def generate_prompts(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        how: Sampling = Sampling(),
        key: jax.Array | None = None,
        stream: Callable[[str], None] | None = None,
    ) -> Generation:
        """Like :meth:`generate` for prompts already made; returns ids and timings."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
        batch = self._collate(prompts)
        room = self.max_positions - max(len(p.input_ids) for p in prompts)
        on_tokens = None if stream is None else _TextStream(self.processor, stream)
        return self.generator.generate(batch, min(max_new_tokens, room), how, key, on_tokens)


class _TextStream:
    """Turns one token per call into pieces of text, holding back incomplete characters."""

    def __init__(self, processor: Processor, emit: Callable[[str], None]):
        self.processor, self.emit = processor, emit
        self.ids: list[int] = []
        self.shown = ""

    def __call__(self, tokens) -> None:
        if int(tokens[0]) in self.processor.stop_ids:
            return
        self.ids.append(int(tokens[0]))
        text = self.processor.decode(self.ids)
        if not text.endswith("\ufffd") and len(text) > len(self.shown):
            self.emit(text[len(self.shown) :])
            self.shown = text


def load(
    folder: str | Path, dtype: Any = None, layout: str = "auto", kv_cache: str = "float"
) -> Model:
    """Load a checkpoint that ``python -m convert.hf_to_flax`` wrote.

    Args:
        folder: the checkpoint folder.
        dtype: float type of everything that is not integer; default float32 on CPU (where bfloat16
            is slower) and bfloat16 elsewhere.
        layout: ``auto``, ``masked`` or ``aifs``, see :class:`Generator`.
        kv_cache: ``float`` or ``int8``, the type of keys and values that are kept.

    Compiled programs are kept on disk for the next start, unless the user has set or turned off
    JAX's compilation cache (:mod:`mquant_jax.compile_cache`). No other configuration of the process
    is changed.

    Raises:
        UserError: no such folder, not a checkpoint, another format version, damaged tensors.
    """
    from mquant_jax.loading import load_model

    keep_compiled_programs()
    loaded = load_model(Path(folder), dtype)
    processor = loaded.family.processor(folder, loaded.config)
    model = Model(loaded.model, loaded.config, loaded.manifest, processor, layout, kv_cache)
    _ = model.generator  # a bad option is refused here, not at the first answer
    return model
