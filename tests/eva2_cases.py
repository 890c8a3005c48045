"""Shared by the tests of GLM-4V and CogVLM2, which have the same kind of tower."""

from __future__ import annotations

CASES = ("glm4v/public", "cogvlm2/public")
# A padded online rotation before fc2, a third layer, another number of heads.
ODD_TOWER = {"hidden_size": 40, "num_heads": 2, "intermediate_size": 86, "num_hidden_layers": 3}
