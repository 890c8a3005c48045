"""The MiniCPM-V family: MiniCPM-V 2.6."""

from __future__ import annotations

from models.base import Family
from models.minicpmv.config import MiniCPMVConfig
from models.minicpmv.modeling import MiniCPMV
from models.minicpmv.processing import collate, example_prompt, reference_batch
from models.minicpmv.streams import streams
from models.minicpmv.weights import ignored, weight_rules

FAMILY = Family(
    name="minicpmv",
    config_from_hf=MiniCPMVConfig.from_hf,
    model=MiniCPMV,
    weight_rules=weight_rules,
    ignored=ignored,
    processor_class="models.minicpmv.processor:MiniCPMVProcessor",
    reference_batch=reference_batch,
    example_prompt=example_prompt,
    collate=collate,
    streams=streams,
    videos=True,
)
