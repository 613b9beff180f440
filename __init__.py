"""Complexity-Deep for Transformers: importing it registers the architecture with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_complexity_deep import ComplexityDeepConfig, DeepConfig
from .modeling_complexity_deep import (
    ComplexityDeepForCausalLM,
    ComplexityDeepForSequenceClassification,
    ComplexityDeepModel,
    ComplexityDeepPreTrainedModel,
    DeepForCausalLM,
)

AutoConfig.register("complexity-deep", ComplexityDeepConfig, exist_ok=True)
AutoModel.register(ComplexityDeepConfig, ComplexityDeepModel, exist_ok=True)
AutoModelForCausalLM.register(ComplexityDeepConfig, ComplexityDeepForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    ComplexityDeepConfig, ComplexityDeepForSequenceClassification, exist_ok=True
)

__all__ = [
    "ComplexityDeepConfig",
    "ComplexityDeepForCausalLM",
    "ComplexityDeepForSequenceClassification",
    "ComplexityDeepModel",
    "ComplexityDeepPreTrainedModel",
    "DeepConfig",
    "DeepForCausalLM",
]
