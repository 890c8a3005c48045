"""What the tests of GLM-4V and CogVLM2, whose towers are of one kind, share."""

from __future__ import annotations

CASES = ("glm4v/public", "cogvlm2/public")
# A padded online rotation in front of fc2, a third layer, heads of another number.
ODD_TOWER = {"hidden_size": 40, "num_heads": 2, "intermediate_size": 86, "num_hidden_layers": 3}
