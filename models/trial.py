"""Build and try a folder's processor before a conversion."""

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

# Files that only accompany a tokenizer.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
               "merges.txt")  # fmt: skip
_SIDE = 56  # pixels of the test picture


def try_processor(family: Family, folder: Path, config: Config) -> None:
    """Build prompts of each kind that the family supports, and decode tokens.

    A folder without a tokenizer is skipped: its weights can still be converted and run on token
    ids. Warns of tokens outside the model's vocabulary.

    Raises:
        UserError: the folder's files do not give a working processor.
    """
    if not any(is_file(folder / name) for name in TOKENIZERS):
        left = [name for name in _COMPANIONS if is_file(folder / name)]
        if left:
            raise UserError(f"{folder}: has {left[0]}, but no tokenizer; expected one of "
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
    _ = processor.sampling_defaults  # reading the file checks it
    for stop in processor.stop_ids:
        processor.decode([stop])
