"""Complexity-Deep for Transformers: importing it registers the architecture with the Auto classes."""

import transformers
from transformers import AutoConfig

from . import modeling_complexity_deep
from .configuration_complexity_deep import AUTO_MAP, ComplexityDeepConfig, DeepConfig
from .modeling_complexity_deep import (
    ComplexityDeepForCausalLM,
    ComplexityDeepForQuestionAnswering,
    ComplexityDeepForSequenceClassification,
    ComplexityDeepForTokenClassification,
    ComplexityDeepModel,
    ComplexityDeepPreTrainedModel,
    DeepForCausalLM,
)

AutoConfig.register("complexity-deep", ComplexityDeepConfig, exist_ok=True)
for auto_class, path in AUTO_MAP.items():
    if auto_class != "AutoConfig":
        model_class = getattr(modeling_complexity_deep, path.rpartition(".")[2])
        getattr(transformers, auto_class).register(ComplexityDeepConfig, model_class, exist_ok=True)

__all__ = [
    "ComplexityDeepConfig",
    "ComplexityDeepForCausalLM",
    "ComplexityDeepForQuestionAnswering",
    "ComplexityDeepForSequenceClassification",
    "ComplexityDeepForTokenClassification",
    "ComplexityDeepModel",
    "ComplexityDeepPreTrainedModel",
    "DeepConfig",
    "DeepForCausalLM",
]
