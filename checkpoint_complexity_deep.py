"""Published Complexity-Deep checkpoint layouts: recognise, convert on load, write back.

The native layout is that of the model's own parameters. The published package (v0.12.0 to v0.13.0) stores experts as
`mlp.gate_up_proj` [E, H, 2I] and `mlp.down_proj` [E, I, H] ([in, out], no `.weight`), one routing table per layer, the
rotary frequencies and a copy of a tied head; older versions differ further. Conversion runs through the library's
checkpoint conversion mapping, so that dtype, device map and sharding options of `from_pretrained` keep working.
"""

import json
import re
import threading
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedConfig, conversion_mapping
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.utils import cached_file

from .configuration_complexity_deep import is_in_every_folder

PUBLISHED_VERSION = "0.13.0"
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# One model is loaded at a time, since the library knows one mapping for a type of model. Each folder with code of its
# own has a copy of this file, and all of them share the lock.
_LOADING = vars(conversion_mapping).setdefault("_complexity_deep_loading", threading.RLock())


class _PublishedConversion(ConversionOps):
    """A conversion of its own type, since PEFT rewrites the library's own for adapters, which have no published form.

    Never reversed: `published_state_dict` writes the published layout.
    """

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        tensors = [input_dict[pattern] for pattern in source_patterns]
        first_of_each = [tensor[0] if isinstance(tensor, list) else tensor for tensor in tensors]
        return {target_patterns[0]: self.merge(*first_of_each)}

    @property
    def reverse_op(self):
        return self


class _Experts(_PublishedConversion):
    """[E, in, out], or gate and up apart (before 0.12.0), to [E, out, in]."""

    @staticmethod
    def merge(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.cat(tensors, dim=-1).transpose(1, 2).contiguous()


class _NoZeroRows(_PublishedConversion):
    """A weight [out, in] without a row of zeros, see `nearly_zero`. Older code wrote such rows."""

    @staticmethod
    def merge(weight: torch.Tensor) -> torch.Tensor:
        if not weight.is_floating_point() or weight.is_meta:  # packed by a quantizer, or without values
            return weight
        is_zero = (weight == 0).all(dim=-1, keepdim=True)
        return torch.where(is_zero, nearly_zero(weight.dtype), weight) if is_zero.any() else weight


class _RoutingTable(_PublishedConversion):
    """One table per layer to one for all; `Checkpoint.check_version` has refused tables that differ."""

    @staticmethod
    def merge(table: torch.Tensor) -> torch.Tensor:
        return table


def nearly_zero(dtype: torch.dtype) -> float:
    """What stands for zero in the trained matrices that start at zero: too little to change what it is added to.

    DoRA and float8 quantization divide by the norm or the maximum of a weight's rows. Rows of exact zeros, which the
    first rows of layer 0's `controller_out` would keep for good as no gradient reaches them, give NaN there.
    """
    return max(1e-12, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)


def rounded_tables(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The routing tables of `state_dict` that an average of models has made floats of, in whole numbers again.

    0.1 * 3 + 0.9 * 3 is less than 3 in fp32, and PyTorch would cut it to 2, the wrong expert. Raises `ValueError` where
    the averaged models had tables that differ.
    """
    rounded = {}
    for name, table in state_dict.items():
        if name.endswith("token_to_expert") and table.is_floating_point() and not table.is_meta:
            rounded[name] = table.round().long()
            if (table - rounded[name]).abs().max() > 0.02:
                raise ValueError(
                    f"{name} does not hold the numbers of experts: only models with the same routing table can be "
                    "averaged or merged."
                )
    return rounded


def _tensors_of(file: str) -> dict[str, torch.Tensor]:
    """The state dict of a `.safetensors` or `.bin` file; values of the latter are read when they are used."""
    if file.endswith(".bin"):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    return load_file(file)


def trains_mu(config, layer_idx: int) -> bool:
    """Whether a gradient reaches mu of a layer."""
    # Without the update, mu of the last layer can only steer its router, whose argmax passes no gradient.
    is_last = layer_idx == config.num_hidden_layers - 1
    router_learns = config.is_routed and config.use_mu_routing and config.mu_router_gradient
    return config.use_dynamics or router_learns or (config.use_mu_guidance and not is_last)


def renamed_tensors(config) -> dict[str, str]:
    """Names that tensors of the base model have in files, with those that they have in the model."""
    renamed = {"token_to_expert": "routing_table.token_to_expert"} if config.is_routed else {}
    if config.use_mu_guidance:
        for name in ("mu_to_q", "mu_to_k", "mu_to_v"):
            renamed[f"layers.0.self_attn.{name}.weight"] = f"layers.0.self_attn.frozen.{name}"
    for layer in range(config.num_hidden_layers):
        if not trains_mu(config, layer):
            renamed[f"layers.{layer}.dynamics.mu_proj.weight"] = f"layers.{layer}.dynamics.frozen.mu_proj"
    return renamed


def to_model_names(state_dict: dict[str, torch.Tensor], config, prefix: str) -> None:
    """Give tensors of files, in place, the names of a model whose base's begin with `prefix`; see `rounded_tables`."""
    for old, new in renamed_tensors(config).items():
        if prefix + old in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + old)
    state_dict.update(rounded_tables(state_dict))


def _native_renamings(config) -> list:
    """`renamed_tensors` as the library takes it, for files of the base model and of one with a head."""
    return [
        WeightRenaming(rf"^{re.escape(prefix + old)}$", prefix + new)
        for old, new in renamed_tensors(config).items()
        for prefix in ("", "model.")
    ]


def _name_in_file(config, name: str) -> str:
    """What a tensor of a model is called in files."""
    names = {new: old for old, new in renamed_tensors(config).items()}
    body = name.removeprefix("model.")
    return name.removesuffix(body) + names.get(body, body)


def _published_layouts() -> list:
    # `(?!\.)` keeps the dense `mlp.down_proj.weight` out (transformers 5.17 adds no boundary of its own).
    return [
        WeightRenaming(r"dynamics\.controller\.0\.", "dynamics.controller_in."),  # before 0.12.0
        WeightRenaming(r"dynamics\.controller\.2\.", "dynamics.controller_out."),
        WeightConverter(
            r"layers\.\d+\.mlp\.token_to_expert", "routing_table.token_to_expert", operations=[_RoutingTable()]
        ),
        WeightConverter(r"mlp\.gate_up_proj(?!\.)", "mlp.experts.gate_up_proj", operations=[_Experts()]),
        WeightConverter(
            [r"mlp\.gate_proj(?!\.)", r"mlp\.up_proj(?!\.)"], "mlp.experts.gate_up_proj", operations=[_Experts()]
        ),
        WeightConverter(r"mlp\.down_proj(?!\.)", "mlp.experts.down_proj", operations=[_Experts()]),
    ]


@contextmanager
def file_layouts(config, is_published: bool):
    """Let the library rename and convert the tensors of a file, native or published, while it is loaded.

    Only then: the library reverses a mapping that stays registered when it saves.
    """
    if not hasattr(config, "is_routed"):  # a GGUF file, or a model that the library is about to refuse
        yield
        return
    mapping = _native_renamings(config)
    if getattr(config, "quantization_config", None) is None:  # a quantized file has its own conversions
        mapping += [
            WeightConverter(rf"{re.escape(name)}\.weight$", f"{name}.weight", operations=[_NoZeroRows()])
            for name in ("dynamics.mu_proj", "dynamics.controller_out", "self_attn.value_gate")
        ]
    if is_published:
        mapping += _published_layouts()
    kind = config.model_type  # a config that is derived from ours may have one of its own
    with _LOADING:
        before = get_checkpoint_conversion_mapping(kind) or []
        register_checkpoint_conversion_mapping(kind, mapping, overwrite=True)
        try:
            yield
        finally:
            register_checkpoint_conversion_mapping(kind, before, overwrite=True)


@dataclass
class Checkpoint:
    """Names, dtypes and shapes of a checkpoint's tensors, read from the headers alone.

    `keys` maps a name without its leading `model.` to (dtype string, shape). `tables` are the routing tables.
    `state_dict` holds the tensors themselves, where the library cannot read them from `files`.
    """

    source: str
    keys: dict = field(default_factory=dict)
    tables: list = field(default_factory=list)
    files: list = field(default_factory=list)
    state_dict: dict | None = None

    @classmethod
    def find(cls, path: str, **hub_kwargs) -> "Checkpoint | None":
        """Read the checkpoint at `path` (local folder or Hub id); `None` where only other formats lie.

        A `pytorch_model.bin` of plain tensors is read like safetensors; any other is left to the library, which says
        what is wrong with it. Raises `OSError` for a file that is not a whole safetensors file, `ValueError` for an
        unreadable `model.pt`.
        """
        variant = hub_kwargs.pop("variant", None)
        suffix = f".{variant}" if variant else ""

        def resolve(name):
            return cached_file(
                path,
                name,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                **hub_kwargs,
            )

        for single, index in (  # in the library's order
            (f"model{suffix}.safetensors", f"model.safetensors.index{suffix}.json"),
            (f"pytorch_model{suffix}.bin", f"pytorch_model.bin.index{suffix}.json"),
        ):
            if file := resolve(single):
                files = [file]
                break
            if file := resolve(index):
                names = sorted(set(json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"].values()))
                files = [resolve(name) for name in names]
                if None in files:
                    raise OSError(f"{path} lacks {names[files.index(None)]}, which its index lists; download it again.")
                break
        else:
            file = resolve("model.pt")
            return cls._from_pickle(file) if file else None
        checkpoint = cls(source=str(path), files=files)
        for file in files:
            if file.endswith(".bin"):
                try:
                    checkpoint._add(_tensors_of(file))
                except Exception:
                    return None
                continue
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (a file handle, not a dict)
                        entry = tensors.get_slice(name)
                        checkpoint.keys[name.removeprefix("model.")] = (entry.get_dtype(), tuple(entry.get_shape()))
                        if name.endswith("token_to_expert"):
                            checkpoint.tables.append(tensors.get_tensor(name))
            except SafetensorError as error:
                raise OSError(f"{file} is truncated or not a safetensors file ({error}); download it again.") from None
        return checkpoint

    @classmethod
    def _from_pickle(cls, file: str) -> "Checkpoint":
        """The published `model.pt`: a bare state dict, or a trainer's checkpoint around one."""
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{file} cannot be loaded as plain weights ({type(error).__name__}); pickled objects are never loaded, "
                "convert it to safetensors in an environment you trust."
            ) from None
        for key in ("model_state_dict", "model"):
            if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
                loaded = loaded[key]
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
            raise ValueError(f"{file} holds no state dict of tensors; it is not a Complexity-Deep checkpoint.")
        checkpoint = cls(source=str(file), state_dict=loaded)
        checkpoint._add(loaded)
        return checkpoint

    def _add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take names, dtypes, shapes and routing tables of a state dict into `keys` and `tables`."""
        names = {value: key for key, value in _SAFETENSORS_DTYPES.items()} | {torch.int8: "I8", torch.uint8: "U8"}
        for name, tensor in tensors.items():
            self.keys[name.removeprefix("model.")] = (names.get(tensor.dtype, "I64"), tuple(tensor.shape))
            if name.endswith("token_to_expert"):
                self.tables.append(tensor)

    def read(self) -> dict[str, torch.Tensor]:
        """Read all tensors into `state_dict`, which is then what is loaded."""
        if self.state_dict is None:
            self.state_dict = {name: tensor for file in self.files for name, tensor in _tensors_of(file).items()}
        return self.state_dict

    def convert_experts(self) -> None:
        """Read all tensors and bring the experts to the native layout.

        For tensor and expert parallelism: the library shards a tensor as it lies in the file, before it transposes it.
        """
        tensors = self.read()
        for name in [name for name in tensors if name.endswith((".mlp.gate_proj", ".mlp.up_proj"))]:
            prefix = name.rpartition(".")[0]
            if name.endswith("gate_proj"):  # before 0.12.0
                gate_up = tensors.pop(name), tensors.pop(f"{prefix}.up_proj")
                tensors[f"{prefix}.gate_up_proj"] = torch.cat(gate_up, dim=-1)
        for name in [name for name in tensors if name.endswith((".mlp.gate_up_proj", ".mlp.down_proj"))]:
            native = tensors.pop(name).transpose(1, 2).contiguous()  # [E, in, out] -> [E, out, in]
            tensors[name.replace(".mlp.", ".mlp.experts.")] = native

    def has(self, suffix: str) -> bool:
        return any(name.endswith(suffix) for name in self.keys)

    @property
    def is_published(self) -> bool:
        """Whether this is a layout of the published package rather than ours."""
        markers = ("mlp.token_to_expert", "mlp.gate_up_proj", "mlp.gate_proj", "rotary_emb.inv_freq")
        return any(self.has(marker) for marker in markers) or self.has("dynamics.controller.0.weight")

    @property
    def dtype(self) -> torch.dtype | None:
        return _SAFETENSORS_DTYPES.get(self.keys.get("embed_tokens.weight", (None,))[0])

    def check_architecture(self, config) -> None:
        """Raise a clear `ValueError` where these tensors belong to another architecture."""
        # Modules, not tensors: a quantizer writes several for one weight, under names of its own.
        expected = ["embed_tokens.weight", "self_attn.o_proj.weight"] + ["dynamics.mu"] * config.use_dynamics
        if config.tie_word_embeddings and self.has("lm_head.weight"):
            del expected[0]  # safetensors' `save_model` keeps one of the two names of a tied weight
        modules = [name.removesuffix("weight").rstrip(".") for name in expected]
        absent = [
            name for name, module in zip(expected, modules) if not any(f".{module}." in f".{key}." for key in self.keys)
        ]
        if absent:
            raise ValueError(f"{self.source} is not a Complexity-Deep checkpoint: it has no {' and no '.join(absent)}.")

    def check_version(self, config) -> None:
        """Raise a clear `ValueError` where the published version that wrote this cannot be computed exactly.

        In any layout, a table may name no expert that the config does not have: its tokens would get zeros.
        """
        highest = max((int(table.max()) for table in self.tables), default=0)
        if config.is_routed and highest >= config.num_experts:
            raise ValueError(
                f"{self.source} routes tokens to expert {highest}, but its config has only {config.num_experts} "
                "experts."
            )
        if not self.is_published:
            return
        if not config.is_routed and self.has("mlp.gate_up_proj"):
            raise ValueError(
                f"{self.source} holds token-routed experts, but its config.json asks for a dense MLP "
                f"(use_token_routed_mlp={config.use_token_routed_mlp}, num_experts={config.num_experts}); the "
                "published layout of a single expert is not supported."
            )
        if any(dtype in ("I8", "U8") for dtype, _ in self.keys.values()):
            raise ValueError(f"{self.source} is an INT8 export, which is not supported.")
        version = self._version(config)
        if version is not None:
            raise ValueError(f"{self.source} cannot be loaded exactly: {version}")
        for table in self.tables[1:]:
            if not torch.equal(table, self.tables[0]):
                raise ValueError(
                    f"{self.source} has routing tables that differ between layers; this model has one for all layers."
                )

    def _version(self, config) -> str | None:
        """Why a published version is not representable, or `None` where it is."""
        if any(re.search(r"mlp\.experts\.\d+\.", name) for name in self.keys):
            if self.has("self_attn.mu_to_q.weight"):
                return "it is an export of the related complexity-framework, a different architecture."
            return "it was written by version 0.4.0, which had no clamps on beta and velocity (added in 0.7.1)."
        has_mu_to_q, has_mu_to_v = self.has("self_attn.mu_to_q.weight"), self.has("self_attn.mu_to_v.weight")
        if has_mu_to_q and not has_mu_to_v:
            return "it was written by version 0.9.0, whose mu guidance has no highway and does not reach the values."
        if not self.has("dynamics.mu_proj.weight"):
            written = getattr(config, "version", None)
            if written is None:
                if self.tables and self._is_range_table(self.tables[0], config.num_experts):
                    return "it was written by version 0.4.x, which had no clamps on beta and velocity (added in 0.7.1)."
                return (
                    "it was written by a version from 0.5.0 to 0.7.1, and only 0.7.1 has the clamps on beta and "
                    'velocity; if it is 0.7.1, add "version": "0.7.1" to its config.json.'
                )
            if tuple(int(part) for part in re.findall(r"\d+", str(written))[:3]) < (0, 7, 1):
                return f"it was written by version {written}, which had no clamps on beta and velocity (from 0.7.1 on)."
        return None

    @staticmethod
    def _is_range_table(table: torch.Tensor, num_experts: int) -> bool:
        ids = torch.arange(table.numel())
        ranges = torch.clamp(ids // max(table.numel() // num_experts, 1), max=num_experts - 1)
        return num_experts > 1 and torch.equal(table.cpu(), ranges)

    @property
    def absent_mu(self) -> bool:
        """Whether mu guidance and routing came only after this version: zeros then reproduce its arithmetic."""
        return self.is_published and not self.has("self_attn.mu_to_q.weight")


def _with_routing_table(device_map: dict, config) -> dict:
    """A hand-written map, which names the modules that models have, with the routing table beside the embedding."""
    embedding = next((name for name in device_map if name.split(".")[-1] == "embed_tokens"), None)
    if embedding is None or not config.is_routed:
        return device_map
    return {embedding.removesuffix("embed_tokens") + "routing_table": device_map[embedding]} | device_map


def _base_of_adapter(path: str, **hub) -> str | None:
    """The base model that an adapter folder names; the library loads it before the adapter."""
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    file = cached_file(path, "adapter_config.json", **quiet, **hub)
    return json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path") if file else None


def published_state_dict(model) -> dict[str, torch.Tensor]:
    """State dict of `model` (a ComplexityDeepForCausalLM) in published layout a (v0.13.0), no storage shared.

    Raises `ValueError` for options that the published package cannot compute.
    """
    if not hasattr(model, "lm_head"):
        raise ValueError(f"The published format holds a causal language model, but this is a {type(model).__name__}.")
    config = model.config
    unsupported = [
        name
        for name, published in (
            ("use_mu_guidance", True),
            ("use_mu_norm", False),
            ("use_dynamics", True),
            ("use_mu_routing", True),
            ("shared_expert_intermediate_size", 0),
            ("routing_per_layer", False),
            ("value_embedding_layers", None),
            ("mu_router_base_logit", 10.0),
            ("qk_norm_eps", 1e-6),
        )
        if getattr(config, name) != published and (config.is_routed or "rout" not in name)
    ]
    allowed = ("silu", "gelu") if config.is_routed else ("silu", "swish", "gelu", "relu")
    unsupported += [] if config.hidden_act in allowed else ["hidden_act"]
    unsupported += ["rope_parameters"] if config.rope_parameters["rope_type"] != "default" else []
    if unsupported:
        raise ValueError(f"The published format cannot hold this model's {', '.join(unsupported)}; save without it.")
    table = model.model.token_to_expert
    inv_freq = model.model.rotary_emb.inv_freq
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("token_to_expert"):
            continue
        if ".mlp.experts." in name:
            name, tensor = name.replace(".experts.", "."), tensor.transpose(1, 2)  # [E, out, in] -> [E, in, out]
        if ".mu" in name or name.endswith("dynamics.controller_out.weight"):  # the zeros that loading replaced
            stand_in = torch.full_like(tensor, nearly_zero(tensor.dtype))
            tensor = tensor.masked_fill((tensor == stand_in).all(dim=-1, keepdim=True), 0)
        state[_name_in_file(config, name)] = tensor.detach().clone(memory_format=torch.contiguous_format)
    for layer in range(config.num_hidden_layers):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = inv_freq.clone()
        if table is not None:
            state[f"model.layers.{layer}.mlp.token_to_expert"] = table.clone()
    return state


def published_config(config) -> dict:
    """Fields that the published loader reads under other names than ours, to be merged into config.json."""
    return {
        "architecture": "DeepForCausalLM",
        "version": PUBLISHED_VERSION,
        "rope_theta": config.rope_parameters["rope_theta"],
        "use_sdpa": True,
        "use_token_routed_mlp": config.is_routed,
    }


if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Model  # what it is mixed into
else:
    _Model = object


class CheckpointMixin(_Model):
    """`from_pretrained` and `save_pretrained` of every Complexity-Deep class: native and published layouts."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load native and published checkpoints alike; see `PreTrainedModel.from_pretrained`.

        `kernels_implementation` ("eager" or "triton") is that of `set_kernels_implementation`.
        Raises `ValueError` for a folder of another architecture, of a published version that cannot be computed
        exactly, or with missing weights; `OSError` for a truncated file. The dtype is the checkpoint's own by default.
        """
        kernels_implementation = kwargs.pop("kernels_implementation", None)
        output_loading_info = kwargs.pop("output_loading_info", False)
        path, checkpoint, given = pretrained_model_name_or_path, None, {}
        config: Any = kwargs.get("config")
        if path is not None and kwargs.get("gguf_file") is None:
            hub_keys = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
            hub = {key: kwargs[key] for key in hub_keys if kwargs.get(key) is not None}
            source = path
            checkpoint = Checkpoint.find(source, variant=kwargs.get("variant"), **hub)
            if checkpoint is None and (source := _base_of_adapter(path, **hub)) is not None:
                hub = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
                checkpoint = Checkpoint.find(source, variant=kwargs.get("variant"), **hub)
            if not isinstance(config, PreTrainedConfig) and (config or source) is not None:
                config = cls.config_class.from_pretrained(config or source, **hub)
                fields = {*config.to_dict(), "rope_theta", "rope_scaling"} - {"dtype", "config"}
                given = {key: kwargs[key] for key in fields & kwargs.keys()}
                if given:  # they decide what the tensors of a file are called in the model
                    config = cls.config_class.from_pretrained(kwargs.get("config") or source, **hub, **given)
        if checkpoint is not None:
            if not output_loading_info:  # whoever asks for it sees what is missing
                checkpoint.check_architecture(config)
            checkpoint.check_version(config)
            if checkpoint.is_published and (kwargs.get("dtype") or kwargs.get("torch_dtype")) in (None, "auto"):
                kwargs.pop("torch_dtype", None)
                kwargs["dtype"] = checkpoint.dtype  # published configs name another dtype than their file holds
            parallel = ("distributed_config", "tp_plan", "tp_size", "device_mesh")
            if checkpoint.is_published and any(kwargs.get(key) is not None for key in parallel):
                checkpoint.convert_experts()
            if any(table.is_floating_point() for table in checkpoint.tables):
                tensors = checkpoint.read()  # for the library would cut the numbers before it converts anything
                tensors.update(rounded_tables(tensors))
            if checkpoint.state_dict is not None:
                kwargs = {key: value for key, value in kwargs.items() if key not in given}
                if cls.can_generate() and kwargs.get("generation_config") is None:
                    with suppress(OSError):  # there is none
                        kwargs["generation_config"] = GenerationConfig.from_pretrained(source, **hub)
                path, kwargs["config"], kwargs["state_dict"] = None, config, checkpoint.state_dict
        elif kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = {**kwargs["state_dict"], **rounded_tables(kwargs["state_dict"])}
        if isinstance(kwargs.get("device_map"), dict):
            kwargs["device_map"] = _with_routing_table(kwargs["device_map"], config)
        with file_layouts(config, checkpoint is not None and checkpoint.is_published):
            model, info = super().from_pretrained(path, *model_args, output_loading_info=True, **kwargs)
        if checkpoint is not None:
            body = ("layers.", "embed_tokens.", "norm.", "routing_table.")  # a new head on an old body is legitimate
            missing = [key for key in info["missing_keys"] if key.removeprefix("model.").startswith(body)]
            if checkpoint.absent_mu:
                with torch.no_grad():
                    for key in [key for key in missing if ".mu" in key]:
                        weight = model.get_parameter_or_buffer(key)
                        weight.fill_(nearly_zero(weight.dtype))
                        missing.remove(key)
            has_adapter = getattr(model, "_hf_peft_config_loaded", False)  # then `info` is about the adapter
            if missing and not output_loading_info and not has_adapter:
                raise ValueError(
                    f"{checkpoint.source} is incomplete: it lacks {len(missing)} weights of this model, e.g. "
                    f"{_name_in_file(config, missing[0])}; check that config.json belongs to these weights."
                )
            if checkpoint.is_published and model.can_generate():
                self_made = cached_file(
                    source, "generation_config.json", _raise_exceptions_for_missing_entries=False, **hub
                )
                # The published `generate` samples unless it is told not to.
                model.generation_config.do_sample = model.generation_config.do_sample or self_made is None
            if path is None:  # the library saw the tensors alone, and not the folder
                model.name_or_path = model.config.name_or_path = str(source)
                adapter_kwargs = dict(kwargs.get("adapter_kwargs") or {})
                adapter = adapter_kwargs.pop("_adapter_model_path", None)  # where an auto class has found its base
                if adapter is None and source != pretrained_model_name_or_path:
                    adapter = pretrained_model_name_or_path
                if adapter is not None:
                    model.load_adapter(adapter, kwargs.get("adapter_name"), adapter_kwargs=adapter_kwargs)
        if kernels_implementation is not None:
            model.set_kernels_implementation(kernels_implementation)
        return (model, info) if output_loading_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """The library's, for classes that are derived from ours; see `is_in_every_folder`."""
        if not is_in_every_folder(cls):
            super().register_for_auto_class(auto_class)

    @classmethod
    def _from_config(cls, config, **kwargs):
        """A new model, as the library makes it for `AutoModel.from_config`.

        vLLM makes the model so, with an attention of its own, and loads the files itself: the library's registry tells
        it the names that their tensors have in the model. Raises `ValueError` for experts that vLLM would compute with
        another activation.
        """
        if getattr(config, "_attn_implementation", None) != "vllm":
            return super()._from_config(config, **kwargs)
        if config.is_routed and config.hidden_act not in ("silu", "swish"):
            raise ValueError(
                f"vLLM computes SiLU in every expert, but this model has hidden_act={config.hidden_act!r}: serve it "
                "with scripts/serve.py."
            )
        # vLLM puts modules of its own in the place of those that our kernels compute, and its experts take no plan.
        config._kernels_implementation = "eager"
        model = super()._from_config(config, **{**kwargs, "experts_implementation": "batched_mm"})
        register_checkpoint_conversion_mapping(config.model_type, _native_renamings(config), overwrite=True)
        return model

    def save_pretrained(self, save_directory, *args, save_original_format: bool = True, **kwargs):
        """Save in the native layout; see `PreTrainedModel.save_pretrained`.

        `save_original_format` is taken and changes nothing, as for every model whose native layout is its original
        one: the library would otherwise go back to the layout of a published file that the model was loaded from. What
        it reverses here are the names alone, see `renamed_tensors`.
        """
        self._weight_conversions = [WeightRenaming(old, new) for old, new in renamed_tensors(self.config).items()]
        super().save_pretrained(save_directory, *args, save_original_format=True, **kwargs)

    def save_published_format(self, save_directory) -> None:
        """Save a local folder in the published layout (v0.13.0, layout a), which the published package loads.

        Raises `ValueError` for options that the published package cannot compute.
        """
        self.save_pretrained(save_directory, state_dict=published_state_dict(self))
        path = Path(save_directory) / "config.json"
        fields = json.loads(path.read_text(encoding="utf-8")) | published_config(self.config)
        temporary = path.with_name(".config.json.tmp")
        temporary.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
