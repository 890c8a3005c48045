"""CogVLM2: the EVA2-CLIP vision module and the generic decoder with a visual expert."""

from __future__ import annotations

from mquant_jax.models.base import VLM
from mquant_jax.models.eva2 import EVA2Vision


class CogVLM2(VLM):
    """CogVLM2 of any size, float or quantised by ``recipe``.

    The last vector of a run of pictures belongs to the language expert, the others to the visual
    expert, according to their ``token_class``.
    """

    VISION = EVA2Vision
