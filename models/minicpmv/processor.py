"""MiniCPM-V: turn files, chat messages and pictures into token ids and patches.

Nothing here touches the network or runs code from the folder.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mquant_jax.errors import UserError
from mquant_jax.models import chat_files, image_settings
from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.chat import ChatFolder, Message, check_count
from mquant_jax.models.images import load_frames, load_image
from mquant_jax.models.minicpmv.config import MiniCPMVConfig
from mquant_jax.models.minicpmv.processing import MASKED, VISUAL, collate
from mquant_jax.models.minicpmv.slices import MEAN, STD, Slicing
from mquant_jax.schema import Refused, Schema, flag, text, whole

MARK = "(<image>./</image>)"  # a picture's mark in a chat's text, as in the published code
_FRAME_SLICES = 2  # per video frame, as in the model card
_STOP = ("<|im_end|>", "<|endoftext|>")
_SYSTEM = "You are a helpful assistant."
# Special tokens by their keys in preprocessor_config.json.
_TOKENS = {
    "im_start": "<image>", "im_end": "</image>", "slice_start": "<slice>", "slice_end": "</slice>",
    "unk": "<unk>", "im_id_start": "<image_id>", "im_id_end": "</image_id>",
}  # fmt: skip
_SETTINGS = Schema(
    {
        "scale_resolution": whole(None, 1, 2**13, null=True),
        "max_slice_nums": whole(None, 0, 1024, null=True),
        "norm_mean": image_settings.MEAN,
        "norm_std": image_settings.STD,
        "use_image_id": flag(None),
        "patch_size": whole(None, 1, 256, null=True),
        "image_feature_size": whole(None, 1, 4096, null=True),
        **{key: text(token) for key, token in _TOKENS.items()},
    },
    refused={
        "slice_mode": Refused((True,), "not supported (pictures of any size would not be "
                              "sliced); set it to true"),
    },
)  # fmt: skip
Picture = tuple[Image.Image, bool]  # and whether it is a video frame


class MiniCPMVProcessor(ChatFolder):
    """Turns pictures and text into a ``Batch``, and tokens into text.

    Args:
        folder: has tokenizer.json, and optionally preprocessor_config.json, tokenizer_config.json
            and a chat template.
        config: the model's config.

    Raises:
        UserError: a file is missing or unreadable, or of another model.
    """

    config: MiniCPMVConfig
    PLACEHOLDER = VISUAL
    MARKS = (MARK,)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """preprocessor_config.json, checked against the model.

        Raises:
            UserError: its patches or visual tokens differ from the model's, or slicing is off.
        """
        path, settings = chat_files.image_settings(self.folder)
        settings = _SETTINGS.read(settings, str(path))
        wanted = {"patch_size": self.config.patch_size, "image_feature_size": self.config.queries}
        image_settings.agree(path, settings, wanted)
        return settings

    @functools.cached_property
    def tokens(self) -> dict[str, str]:
        """The special tokens around pictures, by their keys in the file."""
        return {key: self.settings[key] for key in _TOKENS}

    @property
    def numbers_pictures(self) -> bool:
        """Whether pictures are numbered in a prompt."""
        found = self.settings["use_image_id"]
        return self.config.use_image_id if found is None else found

    @functools.cached_property
    def slicing(self) -> Slicing:
        """How pictures are cut into slices."""
        s, c = self.settings, self.config
        return Slicing(
            s["scale_resolution"] or c.scale_size,
            c.patch_size,
            c.max_slices if s["max_slice_nums"] is None else s["max_slice_nums"],
            s["norm_mean"] or MEAN,
            s["norm_std"] or STD,
        )

    @functools.cached_property
    def tokenizer(self):
        """The folder's tokenizer, with its special tokens checked."""
        tokenizer = super().tokenizer
        known = tokenizer.get_vocab()
        for token in self.tokens.values():
            if token not in known:
                path = self.folder / "tokenizer.json"
                raise UserError(f"{path}: no token {token}; it belongs to another model")
        return tokenizer

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, as in the published code."""
        known = self.tokenizer.get_vocab()
        return tuple(known[t] for t in _STOP if t in known) or super().stop_ids

    @property
    def pad_id(self) -> int:
        """The padding token is fixed: every token with its id is masked."""
        return MASKED

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens; drops id 0 ("!"), like the published code."""
        return super().decode([i for i in ids if int(i) != MASKED])

    def turn(self, text: str, images: list[Any], videos: list[Any]) -> list[dict[str, Any]]:
        """Pictures come before the text, or images where it has ``(<image>./</image>)``."""
        return super().turn(text, [] if MARK in text else images, videos)

    def messages(
        self, messages: Sequence[Message], images: Sequence[Any] = (), videos: Sequence[Any] = ()
    ) -> Prompt:
        """A conversation, to be continued by the assistant.

        Args:
            messages: ``{"role": ..., "content": text or parts}``; a part is ``{"type": "text",
                "text": ...}``, ``{"type": "image"}`` or ``{"type": "video"}``. Each part is on its
                own line. A text may contain ``(<image>./</image>)``.
            images, videos: in the order of their parts and placeholders.

        Raises:
            UserError: the number of pictures differs from that of placeholders; a picture
                cannot be read; a malformed message.
        """
        chat, images, videos = self.conversation(messages, images, videos)
        parts = [part for message in chat for part in message["content"]]
        text_marks = sum(part["text"].count(MARK) for part in parts if part["type"] == "text")
        kinds = [part["type"] for part in parts]
        counts = {"image": kinds.count("image") + text_marks, "video": kinds.count("video")}
        for kind, given in (("image", images), ("video", videos)):
            check_count(f"the prompt has {counts[kind]}", kind, counts[kind], given)
        loaded = iter([load_image(x, f"image {i}") for i, x in enumerate(images)])
        clips = iter([load_frames(x, f"video {i}") for i, x in enumerate(videos)])
        turns, pictures = [], []
        for message in chat:
            lines = []
            for part in message["content"]:
                clip = next(clips) if part["type"] == "video" else None
                lines.append(_line(part, clip))
                marks = lines[-1].count(MARK)
                pictures += [(x, True) for x in clip] if clip else [
                    (next(loaded), False) for _ in range(marks)
                ]  # fmt: skip
            turns.append({"role": message["role"], "content": "\n".join(lines)})
        return self._expand(self._render(turns), pictures)

    def collate(self, prompts: Sequence[Prompt], *, pad_to: int | None = None) -> Batch:
        """Left-pad prompts and pack their pictures into one :class:`Batch`."""
        return collate(self.config, prompts, pad_to)

    def _render(self, chat: list[dict[str, str]]) -> str:
        if self.chat_template is None:
            return render_published(chat)
        return self.render(chat, self.chat_template)

    def _expand(self, text: str, pictures: Sequence[Picture]) -> Prompt:
        """Replace marks by slices. Pictures are numbered from 0 across the conversation."""
        chunks = text.split(MARK)
        check_count(f"{self.folder}: the chat template made {len(chunks) - 1}", "image",
                    len(chunks) - 1, pictures)  # fmt: skip
        ids = self.rendered_ids(chunks[0])
        grids, patches = [], [np.zeros((0, self.config.vision.patch_dim), np.float32)]
        # A picture's text begins and ends with special tokens, at which tokenizers split anyway.
        for number, (picture, chunk) in enumerate(zip(pictures, chunks[1:], strict=True)):
            image, is_frame = picture
            most = min(self.slicing.most, _FRAME_SLICES) if is_frame else self.slicing.most
            slicing = Slicing(**(vars(self.slicing) | {"most": most}))
            slices, grid = slicing.cut(image)
            for part, (h, w) in map(slicing.patches, slices):
                patches.append(part)
                grids.append((1, h, w))
            numbered = not is_frame and self.numbers_pictures
            ids += self._picture_ids(number if numbered else None, grid)
            ids += self.rendered_ids(chunk)
        return self.made(ids, grids, np.concatenate(patches))

    def _picture_ids(self, number: int | None, grid: tuple[int, int] | None) -> list[int]:
        """Ids of one picture's text: its number, the overview, then slices row by row."""
        t = self.tokens
        one = t["slice_start"] + t["slice_end"]
        text = "" if number is None else f"{t['im_id_start']}{number}{t['im_id_end']}"
        text += t["im_start"] + t["im_end"]
        if grid:
            text += "\n".join([one * grid[0]] * grid[1])
        starts = self.tokenizer.convert_tokens_to_ids([t["im_start"], t["slice_start"]])
        out: list[int] = []
        for token in self.encode(text):
            out.append(token)
            if token in starts:
                out += [VISUAL] * self.config.queries
        return out


def _line(part: dict[str, Any], clip: list[Image.Image] | None) -> str:
    """A part of a message as text."""
    if clip is not None:
        return "\n".join([MARK] * len(clip))
    return MARK if part["type"] == "image" else part["text"]


def render_published(chat: Sequence[Message]) -> str:
    """The template that MiniCPM-V 2.6 was released with, for folders without a template.

    Args:
        chat: messages whose content is a text.
    """
    if chat and chat[0]["role"] != "system":
        chat = [{"role": "system", "content": _SYSTEM}, *chat]
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat]
    return "".join(turns) + "<|im_start|>assistant\n"
