"""Checkpoints as a model of lmms-eval: ``--model mquant_jax --model_args pretrained=FOLDER``.

The entry point ``lmms_eval.models`` names :func:`manifest`; pip install 'mquant-jax[lmms-eval]'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from mquant_jax.api import load
from mquant_jax.errors import UserError
from mquant_jax.models.base import Prompt
from mquant_jax.runtime.options import Options
from mquant_jax.runtime.sampling import Sampling
from mquant_jax.validate import kind

MODEL = "mquant_jax"
_DEFAULT_TOKENS = 1024  # as in lmms-eval's own models
_ONLY_GENERATES = f"{MODEL} runs tasks with output_type generate_until; found a task with "


def manifest() -> Any:
    """The ``ModelManifest`` that the entry point returns to lmms-eval."""
    # Not at module level: that package imports this module to call this function.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL, chat_class_path=f"{__name__}.{MQuantJax.__name__}")


class MQuantJax(lmms):
    """A checkpoint that answers lmms-eval's chat requests, in batches sharded over local devices.

    Args:
        pretrained: folder written by ``python -m mquant_jax convert``.
        batch_size: prompts per batch; lmms-eval's default is 1.
        kv_cache, layout: see :func:`mquant_jax.api.load`.
        max_batch_size, device: ignored, other models use them; JAX chooses the device
            (``JAX_PLATFORMS``).

    Raises:
        UserError: a bad option, or not a checkpoint.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        kv_cache: str = "float",
        layout: str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        size = int(batch_size) if str(batch_size).isdecimal() else batch_size
        self.options = Options(batch_size=size, kv_cache=kv_cache, layout=layout)  # type: ignore[arg-type]
        self.model = load(pretrained, kv_cache=kv_cache, layout=layout)
        self.model.devices = jax.local_devices()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answers in the order of the requests.

        Raises:
            UserError: an unsupported request; the message names task and document.
        """
        out: list[GenerationResult | None] = [None] * len(requests)
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[2].items())), []).append(i)
        bar = tqdm(total=len(requests), desc="Model Responding", disable=self.rank != 0)
        for places in alike.values():
            for start in range(0, len(places), self.options.batch_size):
                some = places[start : start + self.options.batch_size]
                for i, answer in zip(some, self._answers([requests[i] for i in some]), strict=True):
                    out[i] = answer
                bar.update(len(some))
        bar.close()
        return [answer for answer in out if answer is not None]

    def _answers(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers to requests with the same options."""
        how = requests[0].args[2]
        sampling, tokens = _sampling(how), int(how.get("max_new_tokens", _DEFAULT_TOKENS))
        made = self.model.generate_prompts([self._prompt(r) for r in requests], tokens, sampling)
        answers = []
        for request, ids in zip(requests, made.tokens, strict=True):
            said = _until(self.model.processor.decode(ids), how.get("until"))
            answers.append(GenerationResult(said, TokenCounts(output_tokens=len(ids))))
            self.cache_hook.add_partial("generate_until", (request.args[0], how), said)
        return answers

    def _prompt(self, request: Instance) -> Prompt:
        _, to_messages, _, doc, task, split = request.args
        try:
            return self.model.processor.chat(
                conversation(to_messages(self.task_dict[task][split][doc]))
            )
        except UserError as e:
            raise type(e)(f"task {task}, document {doc} of {split}: {e}") from e

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """
        Raises:
            UserError: always.
        """
        raise UserError(_ONLY_GENERATES + "loglikelihood")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """
        Raises:
            UserError: always.
        """
        raise UserError(_ONLY_GENERATES + "generate_until_multi_round")


def conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Convert lmms-eval's messages, whose pictures are ``url`` fields, to this package's.

    Raises:
        UserError: audio, or a video file instead of frames.
    """
    chat = []
    for message in messages:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        chat.append({"role": message["role"], "content": [_part(part) for part in parts]})
    return chat


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    match part["type"]:
        case "text":
            return {"type": "text", "text": part["text"]}
        case "image":
            return {"type": "image", "image": part["url"]}
        case "video" if not isinstance(part["url"], str):
            return {"type": "video", "video": part["url"]}
        case "video":
            raise UserError(f"video {part['url']}: video files are not supported; the task must "
                            "pass frames, a list of pictures")  # fmt: skip
    raise UserError(f"a message has a part of type {part['type']!r}; expected text, image, video")


def _sampling(how: Mapping[str, Any]) -> Sampling:
    """Greedy unless the task samples, under any of the names that libraries use for it.

    Raises:
        UserError: beam search.
    """
    if (how.get("num_beams") or 1) != 1:
        raise UserError(
            f"num_beams is {how['num_beams']}; expected 1: beam search is not supported"
        )
    temperature = how.get("temperature") or 0
    if not how.get("do_sample", temperature > 0):
        return Sampling()
    top_p, top_k = how.get("top_p"), how.get("top_k")
    return Sampling(temperature or 1.0, top_k or 0, 1.0 if top_p is None else top_p)


def _until(text: str, stops: Any) -> str:
    """The text before the first stop string.

    Raises:
        UserError: ``stops`` is neither a string nor a list of strings.
    """
    stops = [stops] if isinstance(stops, str) else stops or []
    if not isinstance(stops, list | tuple) or not all(isinstance(s, str) for s in stops):
        raise UserError(f"until is {kind(stops)}; expected a text or a list of texts")
    for stop in stops:
        text = text.partition(stop)[0] if stop else text
    return text
