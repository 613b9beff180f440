# Copyright 2026 the Complexity-Deep for Transformers developers. Licensed under the Apache License 2.0.
"""Complexity-Deep model configuration."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import transformers
from packaging.version import Version

OLDEST_TRANSFORMERS = "5.17"


def check_library_version(installed: str = transformers.__version__) -> None:
    """Raise `ImportError` on a Transformers release that lacks what the model's code calls."""
    if Version(installed).release < Version(OLDEST_TRANSFORMERS).release:
        raise ImportError(
            f"Complexity-Deep needs transformers {OLDEST_TRANSFORMERS} or newer, but {installed} is installed: run "
            "`pip install -U transformers`."
        )


check_library_version()  # before the imports below, which an older release does not have

from huggingface_hub.dataclasses import strict  # noqa: E402
from transformers import PreTrainedConfig  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters  # noqa: E402
from transformers.utils import logging  # noqa: E402

from .registration_complexity_deep import register_adapter_targets  # noqa: E402

logger = logging.get_logger(__name__)

if TYPE_CHECKING:  # never run, but the remote-code loader reads it and so keeps every shipped file beside this one
    from .modeling_complexity_deep import ComplexityDeepModel  # noqa: F401

# Every file that a saved model needs to be loaded by `trust_remote_code=True`, relative to this one.
SHIPPED_FILES = (
    "configuration_complexity_deep.py",
    "modeling_complexity_deep.py",
    "checkpoint_complexity_deep.py",
    "compatibility_complexity_deep.py",
    "continuous_batching_complexity_deep.py",
    "accelerated_complexity_deep.py",
    "decode_graph_complexity_deep.py",
    "forward_graph_complexity_deep.py",
    "training_graph_complexity_deep.py",
    "registration_complexity_deep.py",
    "speculation_complexity_deep.py",
    "routing_complexity_deep.py",
    "kernels/first_call.py",
    "kernels/op_registration.py",
    "kernels/grouped_linear.py",
    "kernels/kernel_reference.py",
    "kernels/kernel_launch.py",
    "kernels/routing_plan.py",
    "kernels/token_routed_gemm.py",
    "kernels/fused_dynamics.py",
    "kernels/mu_guided_qkv.py",
    "kernels/decode_attention.py",
    "kernels/decode_layer.py",
    "kernels/layer_tail.py",
    "kernels/paged_attention.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_complexity_deep.ComplexityDeepConfig",
    "AutoModel": "modeling_complexity_deep.ComplexityDeepModel",
    "AutoModelForCausalLM": "modeling_complexity_deep.ComplexityDeepForCausalLM",
    "AutoModelForSequenceClassification": "modeling_complexity_deep.ComplexityDeepForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_complexity_deep.ComplexityDeepForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_complexity_deep.ComplexityDeepForQuestionAnswering",
}
ACTIVATIONS = ("silu", "swish", "gelu", "relu")
ROUTINGS = ("modulo", "balanced", "random")
# Written by the published package and read by nothing in it, or superseded here.
_PUBLISHED_ONLY_FIELDS = ("architecture", "use_sdpa", "parameters", "innovations")
# Not fields of ours, but read by the library, by the loader of published checkpoints or by other tools.
_FOREIGN_FIELDS = (
    "auto_map",
    "chat_template",
    "classifier_dropout",
    "is_causal",
    "model_type",
    "moe_intermediate_size",
    "quantization_config",
    "token_classification_bias",
    "transformers_version",
    "version",
)
_DERIVED_FIELDS = ("head_dim", "num_experts_per_tok", "layer_types", "attention_chunk_size")  # see `_check_derived`
_FORMER_FIELDS = ("output_router_logits",)  # in folders saved before; no trainer may take it for a balance loss


def is_in_every_folder(some_class: type) -> bool:
    """Whether this is a class of the installed package, whose code and `auto_map` every saved folder has anyway."""
    is_installed = (Path(__file__).parent / "kernels").is_dir()  # the files of a saved folder lie flat
    return is_installed and some_class.__module__.rpartition(".")[0] == __package__


@strict
class ComplexityDeepConfig(PreTrainedConfig):
    r"""
    Configuration of a Complexity-Deep decoder. The defaults are those of the published package (v0.13.0).

    Args:
        vocab_size (`int`, defaults to 100000): number of token ids V.
        hidden_size (`int`, defaults to 768): width H.
        intermediate_size (`int`, defaults to 2048):
            MLP width over all experts; one expert has `intermediate_size // num_experts`, which must divide.
        num_hidden_layers, num_attention_heads, num_key_value_heads (`int`, default to 12, 12, 4): GQA decoder shape.
        max_position_embeddings (`int`, defaults to 2048): context trained on; not a hard limit.
        rope_parameters (`dict`, *optional*):
            Transformers RoPE parameters, of any of its types; `rope_theta=...` is accepted too. Where they are given
            when a model is loaded, the base that it was trained with need not be repeated.
        rms_norm_eps, qk_norm_eps (`float`, default to 1e-6): epsilon of the layer norms and of the query/key norms.
        attention_dropout (`float`, defaults to 0.0): dropout on attention probabilities, the model's only dropout.
        hidden_act (`str`, defaults to `"silu"`): `"silu"`, `"swish"`, `"gelu"` (exact erf) or `"relu"`, in every MLP.
        use_qk_norm (`bool`, defaults to `True`): RMS norm of queries and keys before RoPE.
        sliding_window (`int`, *optional*): number of keys a query sees, itself included.
        use_sliding_window (`bool`, defaults to `True`): `False` sets `sliding_window` to None, as in Qwen's configs.
        use_token_routed_mlp (`bool`, defaults to `True`), num_experts (`int`, defaults to 4):
            token-routed MLP; `False`, or one expert, gives an ordinary dense MLP.
        routing (`str`, defaults to `"modulo"`):
            how the `token_to_expert` table of a *new* model is built: `"modulo"` (id mod E, published), `"random"`
            (equal numbers of ids per expert), or `"balanced"` (call `model.balance_routing(token_counts)`).
        routing_per_layer (`bool`, defaults to `False`):
            a table of its own for each layer, so that ids which share an expert in one layer part in the next. For
            `routing` "random" and "balanced": modulo is the same everywhere.
        use_mu_routing (`bool`, defaults to `True`), mu_router_base_logit (`float`, defaults to 10.0):
            let mu override the token's expert: argmax of `base_logit * one_hot(expert) + mu W_router^T`.
        mu_router_gradient (`bool`, defaults to `False`):
            train `mu_router` by a straight-through gradient; the forward stays bit-identical. The published code never
            trains it.
        shared_expert_intermediate_size (`int`, defaults to 0): width of a gated MLP every token passes through, added
            to its expert's output.
        use_mu_guidance (`bool`, defaults to `True`): let mu of the layer below bias keys, queries and values.
        use_mu_norm (`bool`, defaults to `False`):
            divide that mu m by `sqrt(1 + mean(m^2))`. As published it is not normalised, and it comes from values that
            the mu below has biased, so that it may grow from layer to layer without a bound.
        value_embedding_layers (`list[int]`, *optional*):
            layers whose values get a vector of the token id added, times `2 sigmoid(W m)` for each key/value head, with
            m the guidance of the layer below, or the normed hidden state where there is none. New vectors are drawn
            like other embeddings, and W starts at 1e-12, which makes every gate 1.
        use_dynamics (`bool`, defaults to `True`): INL dynamics on the attention output.
        dynamics_alpha, dynamics_beta, dynamics_gate (`float`, default to 0.9, 0.1, 0.5):
            values that alpha, beta and gate have in a new model.
        dynamics_dt (`float`, defaults to 0.1): step size of the dynamics.
        dynamics_controller_hidden (`int`, defaults to 64): width C of the controller.
        initializer_range (`float`, defaults to 0.02): standard deviation of new weights.
        scaled_residual_init (`bool`, defaults to `False`):
            start `o_proj` and the down projections at `initializer_range / sqrt(2 * num_hidden_layers)`.
        use_cache, tie_word_embeddings (`bool`, default to `True`): as in every model of the library.
        pad_token_id, bos_token_id, eos_token_id (`int`, default to 1, 2, 0): special ids of the published tokenizer.

    ```python
    >>> from complexity_deep import ComplexityDeepConfig, ComplexityDeepForCausalLM
    >>> model = ComplexityDeepForCausalLM(ComplexityDeepConfig(vocab_size=1024, num_hidden_layers=2))
    ```
    """

    model_type = "complexity-deep"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "cache",
        "past_key_values",
        "router_logits",
        "expert_ids",
        "velocities",
        "mus",
    ]

    base_model_tp_plan = {  # of a class and, without the rules for modules that are not there, of each config
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.mu_to_q": "colwise",
        "layers.*.self_attn.mu_to_k": "colwise",
        "layers.*.self_attn.mu_to_v": "colwise",
        "layers.*.self_attn.value_embedding": "embedding_by_heads",
        "layers.*.self_attn.value_gate": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_expert.gate_proj": "colwise",
        "layers.*.mlp.shared_expert.up_proj": "colwise",
        "layers.*.mlp.shared_expert.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan: ClassVar[dict] = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 100000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 4
    max_position_embeddings: int = 2048
    rope_parameters: RopeParameters | dict | None = None
    rms_norm_eps: float = 1e-6
    qk_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    hidden_act: str = "silu"
    use_qk_norm: bool = True
    sliding_window: int | None = None
    use_sliding_window: bool = True
    use_token_routed_mlp: bool = True
    num_experts: int = 4
    routing: str = "modulo"
    routing_per_layer: bool = False
    use_mu_routing: bool = True
    mu_router_base_logit: float | int = 10.0
    mu_router_gradient: bool = False
    shared_expert_intermediate_size: int = 0
    use_mu_guidance: bool = True
    use_mu_norm: bool = False
    value_embedding_layers: list[int] | None = None
    use_dynamics: bool = True
    dynamics_alpha: float | int = 0.9
    dynamics_beta: float | int = 0.1
    dynamics_gate: float | int = 0.5
    dynamics_dt: float | int = 0.1
    dynamics_controller_hidden: int = 64
    initializer_range: float = 0.02
    scaled_residual_init: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 0

    def __post_init__(self, **kwargs):
        for field in (*_PUBLISHED_ONLY_FIELDS, *_FORMER_FIELDS):
            kwargs.pop(field, None)
        for field in [key for key in kwargs if key.startswith("safety_")]:
            kwargs.pop(field)
        kwargs.pop("_kernels_implementation", None)  # of the machine, not of the model
        self._check_derived(kwargs)
        self._check_names(kwargs)
        self._check()
        super().__post_init__(**kwargs)
        self.settle()
        ignored = [name for name in kwargs if name in vars(self) and name not in _FOREIGN_FIELDS and name[0] != "_"]
        if ignored:
            logger.warning_once(f"{type(self).__name__} has no field {', '.join(ignored)}: the model does not use it.")

    def settle(self) -> None:
        """Check all fields together, and set what follows from them; for a config whose fields were set one by one.

        Every new model calls this: `from_pretrained` sets its overrides after `__post_init__`, and so do callers.
        Raises `ValueError` for a name that is most likely a misspelt field, and for what cannot be built.
        """
        self._check_names(set(vars(self)) - {field.name for field in dataclasses.fields(self)})
        self._check_derived(self.__dict__)
        self._check()
        if "rope_theta" in vars(self):  # the library reads `rope_parameters` alone
            self.rope_parameters = {**(self.rope_parameters or {}), "rope_theta": self.__dict__.pop("rope_theta")}
        self._check_rope()
        self.value_embedding_layers = self.value_embedding_layers or None  # none and an empty list are the same
        # The library's masks and caches look at `sliding_window` alone.
        self.sliding_window = self.sliding_window if self.use_sliding_window else None
        # The plan of this model, with what the library or a quantizer has added to it. The library warns of rules for
        # modules that are not there.
        absent = {
            ".mlp.experts": not self.is_routed,
            ".mlp.shared_expert.": not (self.is_routed and self.shared_expert_intermediate_size),
            ".mlp.gate_proj": self.is_routed,
            ".mlp.up_proj": self.is_routed,
            ".mlp.down_proj": self.is_routed,
            "_norm": not self.use_qk_norm,
            ".mu_to_": not self.use_mu_guidance or self.num_hidden_layers == 1,  # layer 0 holds them unused
            ".value_": not self.value_embedding_layers,
        }
        parts = [part for part, is_absent in absent.items() if is_absent]
        plan = {**type(self).base_model_tp_plan, **(self.base_model_tp_plan or {})}
        self.base_model_tp_plan = {k: v for k, v in plan.items() if not any(part in k for part in parts)}

    def _check_derived(self, kwargs: dict) -> None:
        """Take what follows from other fields out of `kwargs`; raise `ValueError` where it contradicts them."""
        layer_type = "sliding_attention" if self.sliding_window and self.use_sliding_window else "full_attention"
        for name, value, reason in (
            ("head_dim", self.hidden_size // max(self.num_attention_heads, 1), "hidden_size / num_attention_heads"),
            ("num_experts_per_tok", 1, "every token passes through one expert"),
            # The library would choose masks and caches by these two.
            ("layer_types", [layer_type] * self.num_hidden_layers, "all layers follow sliding_window"),
            ("attention_chunk_size", None, "attention is not chunked"),
        ):
            given = kwargs.pop(name, None)
            if given is not None and given != value:
                raise ValueError(f"{name} is always {value} here ({reason}), but is given as {given}: leave it out.")

    def _check_names(self, names: Iterable[str]) -> None:
        """Raise `ValueError` for a name that is most likely a misspelt field, whose value would have no effect."""
        fields = [field.name for field in dataclasses.fields(self)]
        for name in set(names) - set(_FOREIGN_FIELDS):
            meant = difflib.get_close_matches(name, fields, n=1, cutoff=0.85)
            if meant and name[0] != "_":
                raise ValueError(f"{type(self).__name__} has no field {name}: do you mean {meant[0]}?")

    def _check(self):
        """Raise one clear `ValueError` for a shape or option that cannot be built."""
        sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        sizes += "num_experts max_position_embeddings dynamics_controller_hidden"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        if self.shared_expert_intermediate_size < 0:
            raise ValueError(
                "shared_expert_intermediate_size must be 0 (none) or more, but is "
                f"{self.shared_expert_intermediate_size}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads "
                f"({self.num_attention_heads})."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be divisible by num_key_value_heads "
                f"({self.num_key_value_heads})."
            )
        head_dim = self.hidden_size // self.num_attention_heads
        if head_dim % 2:
            raise ValueError(
                f"head_dim = hidden_size / num_attention_heads must be even for RoPE, but is {head_dim} "
                f"({self.hidden_size} / {self.num_attention_heads})."
            )
        if self.is_routed and self.intermediate_size % self.num_experts:
            raise ValueError(
                f"intermediate_size ({self.intermediate_size}) must be divisible by num_experts ({self.num_experts}): "
                "it is the width over all experts."
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, but is {self.hidden_act!r}.")
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, but is {self.routing!r}.")
        if self.is_routed and self.routing_per_layer and self.routing == "modulo":
            raise ValueError(
                'routing_per_layer needs routing "random" or "balanced": "modulo" gives every layer the same table.'
            )
        layers = self.value_embedding_layers or []
        if len(set(layers)) < len(layers) or not all(0 <= layer < self.num_hidden_layers for layer in layers):
            raise ValueError(
                f"value_embedding_layers must name layers from 0 to {self.num_hidden_layers - 1}, each once, but is "
                f"{layers}."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be None or at least 1, but is {self.sliding_window}.")
        for name, upper in (("dynamics_alpha", 1.0), ("dynamics_gate", 1.0), ("dynamics_beta", 2.0)):
            if not 0.0 < getattr(self, name) < upper:
                raise ValueError(f"{name} must lie between 0 and {upper:g}, but is {getattr(self, name)}.")
        unbounded = ("rms_norm_eps", "qk_norm_eps", "initializer_range", "dynamics_dt")
        for name, upper in (("attention_dropout", 1.0), *((name, math.inf) for name in unbounded)):
            if not 0.0 <= getattr(self, name) < upper:  # PyTorch says so late, or never
                raise ValueError(f"{name} must be at least 0 and less than {upper:g}, but is {getattr(self, name)}.")
        if not math.isfinite(self.mu_router_base_logit):
            raise ValueError(f"mu_router_base_logit must be a finite number, but is {self.mu_router_base_logit}.")

    def _check_rope(self):
        """Raise `ValueError` for RoPE parameters of which the library would make tables that do not fit a head."""
        rope = dict(self.rope_parameters or {})
        absent = [name for name in ("rope_type", "rope_theta") if rope.get(name) is None]
        if absent:
            raise ValueError(f"rope_parameters must name {' and '.join(absent)}, but is {rope}.")
        kind, theta, share = rope["rope_type"], rope["rope_theta"], rope.get("partial_rotary_factor", 1)
        if not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
            raise ValueError(f"rope_theta must be a number above 0, but is {theta!r}.")
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            raise ValueError(f"rope_type must be one of default, {', '.join(ROPE_INIT_FUNCTIONS)}, but is {kind!r}.")
        if share != 1 and kind != "proportional":
            raise ValueError(f"partial_rotary_factor must be 1 with rope_type {kind!r}, but is {share}.")
        frequencies = self.hidden_size // self.num_attention_heads // 2
        for name in ("short_factor", "long_factor"):
            if kind == "longrope" and len(rope[name]) != frequencies:  # the library has refused lists that are missing
                raise ValueError(
                    f"{name} must hold {frequencies} numbers, one for each frequency of a head, but holds "
                    f"{len(rope[name])}."
                )

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """The library's; `rope_parameters`, which once were `rope_scaling`, and `rope_theta` may be in `kwargs`.

        They take the place of those in `config_dict`, checked and completed as if it had them. What training decided is
        kept: the base, and the length before a scaling. The library would set them as they are, without a base.
        """
        theta, scaling = kwargs.pop("rope_theta", None), kwargs.pop("rope_scaling", None)
        parameters = kwargs.pop("rope_parameters", scaling)
        if theta is not None or parameters is not None:
            config_dict = dict(config_dict)
            trained = config_dict.pop("rope_scaling", None) or config_dict.get("rope_parameters") or {}
            parameters = trained if parameters is None else parameters
            if isinstance(parameters, dict):  # the library says what is wrong with anything else
                kept = ["rope_theta"]
                if parameters.get("rope_type", parameters.get("type")) in ("llama3", "longrope", "yarn"):
                    kept.append("original_max_position_embeddings")
                parameters = {name: trained[name] for name in kept if name in trained} | parameters
                parameters |= {} if theta is None else {"rope_theta": theta}
            config_dict["rope_parameters"] = parameters
        derived = {name: kwargs.pop(name) for name in _DERIVED_FIELDS if name in kwargs}
        made = super().from_dict(config_dict, **kwargs)
        (made[0] if isinstance(made, tuple) else made)._check_derived(derived)  # which no override can change
        return made

    @property
    def is_routed(self) -> bool:
        """Whether the MLPs are token-routed; one expert is the same as a dense MLP."""
        return self.use_token_routed_mlp and self.num_experts > 1

    @property
    def has_mu(self) -> bool:
        """Whether any part of a layer takes mu, so that the layers compute it."""
        return self.use_dynamics or self.use_mu_guidance or (self.is_routed and self.use_mu_routing)

    @property
    def moe_intermediate_size(self) -> int:
        """Width I of one expert (other engines read this name)."""
        return self.intermediate_size // self.num_experts

    @moe_intermediate_size.setter
    def moe_intermediate_size(self, width: int) -> None:
        self.intermediate_size = width * self.num_experts

    @property
    def num_experts_per_tok(self) -> int:
        """Experts a token passes through: always one."""
        return 1

    def to_dict(self) -> dict:
        """All fields but the kernels in use, which belong to this machine and not to the model."""
        register_adapter_targets()  # PEFT reads the config here, just before it looks for the targets of its type
        fields = super().to_dict()
        fields.pop("_kernels_implementation", None)
        return fields

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """The library's, for classes that are derived from ours; see `is_in_every_folder`."""
        if not is_in_every_folder(cls):
            super().register_for_auto_class(auto_class)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save `config.json`, with an `auto_map`, and beside it every code file that loading by remote code needs.

        The model, Trainer and `push_to_hub` all save through here. The remote-code loader wants its files flat, so
        `kernels/x.py` becomes `x.py` and the import of it is rewritten. Entries of the `auto_map` stay where they name
        code of others in the folder: the library puts it there before, for a class that is derived from ours.
        """
        directory, ours = Path(save_directory), {Path(name).stem for name in SHIPPED_FILES}
        if directory.is_file():
            raise ValueError(f"save_pretrained needs a directory, but {directory} is a file.")
        found = getattr(self, "auto_map", None) or {}
        modules = {name: str(path).split("--")[-1].split(".")[0] for name, path in found.items()}
        others = [name for name, module in modules.items() if module not in ours]
        others = [name for name in others if (directory / f"{modules[name]}.py").exists()]
        self.auto_map = {**AUTO_MAP, **{name: found[name] for name in others}}
        directory.mkdir(parents=True, exist_ok=True)
        here = Path(__file__).resolve().parent
        for name in SHIPPED_FILES:
            source = here / name
            if not source.exists():  # loaded by remote code: the files lie flat already
                source = here / source.name
            target = directory / source.name
            if target.exists() and target.samefile(source):
                continue
            temporary = target.with_name(f".{target.name}.tmp")
            code = source.read_text(encoding="utf-8").replace("from .kernels.", "from .")
            temporary.write_text(code, encoding="utf-8")
            temporary.replace(target)
        super().save_pretrained(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", directory.name), **kwargs)


DeepConfig = ComplexityDeepConfig  # name in the published package

__all__ = ["ComplexityDeepConfig", "DeepConfig"]
