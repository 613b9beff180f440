"""Lists of known models inside the libraries, which treat a model that is not on them differently and say nothing.

Transformers: Trainer shifts the labels of label smoothing only for causal language models whose class is listed, and
pipelines and model cards look their tasks up. PEFT: which modules an adapter changes when nobody names them.
"""

import sys

from transformers.models.auto import modeling_auto

MODEL_TYPE = "complexity-deep"
# Name of the list in modeling_auto -> our class.
LISTED_CLASSES = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "ComplexityDeepForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "ComplexityDeepForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "ComplexityDeepForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "ComplexityDeepForQuestionAnswering",
}
# Modules that every Complexity-Deep model has, of those that PEFT adapts in a Llama.
_ADAPTABLE = ("q_proj", "k_proj", "v_proj", "o_proj", "input_layernorm", "post_attention_layernorm", "norm")


def register_classes() -> None:
    """Put the model's classes on the lists of Transformers."""
    for list_name, class_name in LISTED_CLASSES.items():
        getattr(modeling_auto, list_name)[MODEL_TYPE] = class_name


def register_adapter_targets() -> None:
    """Give PEFT, where it is imported, the default targets that a Llama has: attention and norms."""
    constants = sys.modules.get("peft.utils.constants")
    for name, targets in list(vars(constants).items()) if constants else ():
        is_list = name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING")
        if is_list and "llama" in targets:
            targets.setdefault(MODEL_TYPE, [module for module in targets["llama"] if module in _ADAPTABLE])
