"""A folder's processor, built and tried before anything is converted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mquant_jax.cli_support import warn
from mquant_jax.errors import UserError
from mquant_jax.files import is_file
from mquant_jax.models.chat_files import TOKENIZERS

if TYPE_CHECKING:
    from mquant_jax.models.base import Config, Family

# Files that only a tokenizer has beside it.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
               "merges.txt")  # fmt: skip
_SIDE = 56  # pixels of the picture that is tried


def try_processor(family: Family, folder: Path, config: Config) -> None:
    """Make prompts of each kind that the family takes, and text of tokens.

    A folder without any tokenizer is left alone: its weights convert, and take token ids. A warning
    says how many tokens a tokenizer has that the model does not know.

    Raises:
        UserError: the folder's files make no working processor.
    """
    if not any(is_file(folder / name) for name in TOKENIZERS):
        left = [name for name in _COMPANIONS if is_file(folder / name)]
        if left:
            raise UserError(f"{folder}: holds {left[0]}, but no tokenizer; expected one of "
                            f"{', '.join(TOKENIZERS)}")  # fmt: skip
        return
    processor = family.processor(folder, config)
    if said := processor.vocabulary_warning():
        warn(said, "tokenizer")
    picture = np.full((_SIDE, _SIDE, 3), 128, np.uint8)
    prompts = [processor.prompt("Hello")]
    if family.pictures:
        prompts.append(processor.prompt("Hello", images=[picture]))
    if family.videos:
        prompts.append(processor.prompt("Hello", videos=[[picture, picture]]))
    for prompt in prompts:
        processor.collate([prompt])
    processor.decode(processor.encode("Hello"))
    _ = processor.sampling_defaults  # the file is checked as it is read
    for stop in processor.stop_ids:
        processor.decode([stop])
