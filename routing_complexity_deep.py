"""Routing: which expert a token id selects, which token id stands for an input, and the order of tokens by expert.

A routing table is [V] int64. It is built for a new model and saved with it. A model with `routing_per_layer` has one
for each layer, [L, V].

Shapes: B batch, S sequence, T = B * S tokens, H hidden size, E experts, L layers, V token ids.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .kernels.kernel_reference import routing_plan_reference
from .kernels.op_registration import is_transformed

if TYPE_CHECKING:  # what the mixins of this file are mixed into
    from transformers import PreTrainedModel
else:
    PreTrainedModel = object

PLANNED_TOGETHER = 4096  # experts of all layers in one sort, whose kernels hold a count of each of them in registers


def modulo_routing(vocab_size: int, num_experts: int) -> Tensor:
    """The published table: expert = token id mod E. Returns [V] int64."""
    return torch.arange(vocab_size) % num_experts


def random_routing(vocab_size: int, num_experts: int, seed: int = 0) -> Tensor:
    """A fixed random table with equal numbers of ids per expert, the same on every device. Returns [V] int64."""
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed), device="cpu")
    return modulo_routing(vocab_size, num_experts)[order]


def new_routing_table(config, extends: bool = False) -> Tensor:
    """Table [V], or [L, V] with `routing_per_layer`, of a new model, or of ids that a resized vocabulary `extends` by.

    A "balanced" table starts as that of modulo, or of random with `routing_per_layer`, until its tokens are counted.
    """
    size = config.vocab_size, config.num_experts
    if config.routing_per_layer:
        return torch.stack([random_routing(*size, seed=layer) for layer in range(config.num_hidden_layers)])
    return random_routing(*size) if config.routing == "random" and not extends else modulo_routing(*size)


def balanced_routing(token_counts: Tensor, num_experts: int, seed: int = 0) -> Tensor:
    """Table that balances corpus tokens: greedy longest-processing-time bin packing of `token_counts` [V].

    Ids are given, most frequent first, to the expert with the fewest tokens; ids that never occur go to the expert with
    the fewest ids. Another `seed` gives another table as balanced, because it disturbs the order in which ids are given
    out: each count weighs up to twice as much. Returns [V] int64.
    """
    counts = token_counts.cpu()
    table = torch.empty_like(counts, dtype=torch.int64)
    weight = torch.ones_like(counts, dtype=torch.float64)
    if seed:
        generator = torch.Generator().manual_seed(seed)
        weight += torch.rand(weight.shape, generator=generator, dtype=torch.float64, device="cpu")
    order = torch.argsort(counts * weight, descending=True, stable=True)
    counts = counts[order]
    seen = int((counts > 0).sum())
    heap = [(0, 0, expert) for expert in range(num_experts)]  # (tokens, ids, expert)
    for count, token in zip(counts[:seen].tolist(), order[:seen].tolist()):
        tokens, ids, expert = heapq.heappop(heap)
        table[token] = expert
        heapq.heappush(heap, (tokens + count, ids + 1, expert))
    heap = [(ids, tokens, expert) for tokens, ids, expert in heap]
    heapq.heapify(heap)
    for token in order[seen:].tolist():
        ids, tokens, expert = heapq.heappop(heap)
        table[token] = expert
        heapq.heappush(heap, (ids + 1, tokens, expert))
    return table


class RoutingPlan(NamedTuple):
    """Tokens sorted by expert.

    order [T] int32: token at each sorted position. offsets [E + 1] int32: where each expert's rows begin and end.
    """

    order: Tensor
    offsets: Tensor


# Which function makes the plan for an `experts_implementation`; implementations that take no plan are not listed.
ROUTING_PLANS: dict[str, Callable] = {"eager": routing_plan_reference}


def layer_routing_plans(make_plan: Callable, expert_ids: Tensor, num_experts: int) -> list[RoutingPlan]:
    """The plan of every layer, from the expert ids [L, T], in as few sorts as possible.

    In a sort of several layers, layer l has the experts l E .. l E + E - 1. The sort is stable, so that the rows of one
    layer stand together and its plan is a part of the whole.
    """
    plans, tokens = [], expert_ids.shape[1]
    for group in expert_ids.split(max(1, PLANNED_TOGETHER // num_experts)):
        shift = torch.arange(len(group), device=group.device)[:, None] * num_experts
        order, offsets = make_plan((group + shift).flatten(), len(group) * num_experts)
        for layer in range(len(group)):
            first, expert = layer * tokens, layer * num_experts
            own_offsets = offsets[expert : expert + num_experts + 1] - first
            plans.append(RoutingPlan(order[first : first + tokens] - first, own_offsets))
    return plans


class VocabularyMixin(PreTrainedModel):
    """What every Complexity-Deep class, with any head, does with its routing table when the vocabulary changes."""

    def value_embeddings(self) -> list[tuple[nn.Module, nn.Module]]:
        """Every module that has a value embedding, with it, also where a layer is inside a class of somebody else."""
        children = [(module, dict(module.named_children()).get("value_embedding")) for module in self.modules()]
        return [(module, embedding) for module, embedding in children if embedding is not None]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding, and let routing table and value embeddings have as many ids as it.

        Old ids keep their expert. New ones get id mod E, or with `routing_per_layer` a random expert in each layer.
        `resize_token_embeddings` comes through here, also that of a model which holds this one as a part.
        """
        super().set_input_embeddings(value)
        base, config = self.base_model, self.config
        config.vocab_size = getattr(value, "num_embeddings", config.vocab_size)
        for module, embedding in self.value_embeddings():
            module.value_embedding = self._get_resized_embeddings(embedding, config.vocab_size)
        if config.is_routed and base.token_to_expert.shape[-1] != config.vocab_size:
            table = new_routing_table(config, extends=True).to(base.token_to_expert.device)
            kept = min(table.shape[-1], base.token_to_expert.shape[-1])
            table[..., :kept] = base.token_to_expert[..., :kept]
            base.token_to_expert = table

    @torch.no_grad()
    def balance_routing(self, token_counts: Tensor) -> None:
        """Rebuild the routing table of a new model from corpus counts [V], so that every expert sees as many tokens.

        Raises `ValueError` for counts of another length than the vocabulary, or a model without experts.
        """
        table = self.base_model.token_to_expert if self.config.is_routed else None
        if table is None or len(token_counts) != table.shape[-1]:
            raise ValueError(
                f"balance_routing needs a token-routed model and one count for each of its {self.config.vocab_size} "
                f"token ids, but got {len(token_counts)} counts."
            )
        counts, layers = torch.as_tensor(token_counts), self.config.num_hidden_layers
        if self.config.routing_per_layer:
            tables = [balanced_routing(counts, self.config.num_experts, seed=layer) for layer in range(layers)]
            table.copy_(torch.stack(tables))
        else:
            table.copy_(balanced_routing(counts, self.config.num_experts))
        self.config.routing = "balanced"


class TokenRoutingMixin(PreTrainedModel):
    """How the base model gets from its inputs to the expert of every token in every layer."""

    @property
    def token_to_expert(self) -> Tensor | None:
        """The routing table [V] or [L, V], int64, or None without experts. It may be written in place or replaced.

        Raises `ValueError` where the replacement is no table of this model's experts.
        """
        return self.routing_table.token_to_expert if self.config.is_routed else None

    @token_to_expert.setter
    def token_to_expert(self, table: Tensor) -> None:
        config, wanted = self.config, "[layers, vocabulary]" if self.config.routing_per_layer else "[vocabulary]"
        is_table = table.shape[-1] == config.vocab_size and table.ndim == 1 + config.routing_per_layer
        is_table = is_table and not table.is_floating_point()
        if is_table and not table.is_meta:
            is_table = int(table.min()) >= 0 and int(table.max()) < config.num_experts
        if not is_table:
            raise ValueError(
                f"token_to_expert must be {wanted} with an expert from 0 to {config.num_experts - 1} for each of "
                f"{config.vocab_size} token ids, but is {table.dtype} of shape {tuple(table.shape)} or names others."
            )
        self.routing_table.token_to_expert = table

    def check_token_ids(self, ids: Tensor, name: str) -> None:
        """Raise `ValueError` for ids that are no [B, S] int64 or int32, or, on the CPU, outside the vocabulary."""
        if not isinstance(ids, Tensor):
            raise ValueError(f"{name} must be a tensor of token ids, but is a {type(ids).__name__}.")
        if ids.ndim != 2:
            raise ValueError(f"{name} must be [batch, sequence], but has shape {tuple(ids.shape)}.")
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name} must be int64 or int32 token ids, but has dtype {ids.dtype}.")
        # On another device, reading the ids would make the host wait. Under tracing, FakeTensor and vmap, ids have no
        # values that Python could read.
        has_values = type(ids) is Tensor and not torch.compiler.is_compiling() and not is_transformed()
        if has_values and ids.device.type == "cpu" and ids.numel():
            smallest, largest = ids.aminmax()
            if smallest < 0 or largest >= self.config.vocab_size:
                raise ValueError(
                    f"{name} holds token id {int(largest if smallest >= 0 else smallest)}, but the vocabulary has ids "
                    f"0 to {self.config.vocab_size - 1}; check that the tokenizer belongs to this model."
                )

    @torch.no_grad()
    def nearest_token_ids(self, inputs_embeds: Tensor) -> Tensor:
        """Ids [B, S] of the embedding rows nearest to `inputs_embeds` [B, S, H]; an unmodified row gives its own id.

        Distances are those of true differences in at least fp32, because the shortcut |w|^2 - 2 e.w cannot tell close
        rows apart. The lowest id wins between equal rows.
        """
        dtype = torch.promote_types(inputs_embeds.dtype, torch.float32)
        # By a call of the module: its weight alone may be offloaded, divided among processes, quantized, or adapted.
        # Hooks on it expect the rows of a batch.
        every_id = torch.arange(self.config.vocab_size, device=inputs_embeds.device)[None]
        # Detached, as the distance has no forward-mode derivative, which `no_grad` leaves on.
        weight = self.embed_tokens(every_id)[0].detach().to(inputs_embeds.device, dtype)
        rows = inputs_embeds.detach().reshape(-1, inputs_embeds.shape[-1]).to(dtype)
        # 1024 rows at a time, so that the distances [1024, V] stay small whatever the batch.
        exact = "donot_use_mm_for_euclid_dist"
        nearest = [torch.cdist(part, weight, compute_mode=exact).argmin(dim=-1) for part in rows.split(1024)]
        return torch.cat(nearest).reshape(inputs_embeds.shape[:-1])

    def routing_token_ids(self, input_ids: Tensor | None, inputs_embeds: Tensor, routing_ids: Tensor | None) -> Tensor:
        """Ids [B, S] that choose experts and value embeddings: `routing_ids`, `input_ids` or the nearest embedding.

        Raises `ValueError` for `routing_ids` of another shape than the input, or that are no token ids.
        """
        if routing_ids is None:
            return input_ids if input_ids is not None else self.nearest_token_ids(inputs_embeds)
        self.check_token_ids(routing_ids, "routing_ids")
        if routing_ids.shape != inputs_embeds.shape[:-1]:
            raise ValueError(
                f"routing_ids must have the [batch, sequence] shape of the input, "
                f"{tuple(inputs_embeds.shape[:-1])}, but has {tuple(routing_ids.shape)}."
            )
        return routing_ids

    def expert_ids_by_layer(self, token_ids: Tensor) -> list[Tensor]:
        """Expert of each token by the routing table, [B, S] for each layer, from the token ids [B, S].

        Raises `ValueError` where the embedding has grown, or layers were removed or copied, and the table was not.
        """
        ids, embedding = self.routing_table.token_to_expert.shape[-1], self.embed_tokens
        if type(embedding) is nn.Embedding and embedding.weight.shape[0] > ids:  # others may be padded or divided
            raise ValueError(
                f"The embedding has {embedding.weight.shape[0]} rows, but the routing table {ids}: change the "
                "embedding by resize_token_embeddings or set_input_embeddings."
            )
        experts, layers = self.routing_table(token_ids), self.config.num_hidden_layers
        if self.config.routing_per_layer and len(experts) != len(self.layers):
            raise ValueError(
                f"This model has {len(self.layers)} layers, but routing tables for {len(experts)}: set "
                "base_model.token_to_expert to [layers, vocabulary], with the row that belongs to each layer."
            )
        return list(experts[:layers]) if self.config.routing_per_layer else [experts] * layers

    def routing_plans(self, expert_ids: list[Tensor]) -> Sequence[RoutingPlan | None]:
        """The plan of each layer, made at once for all, or None where the layer itself has to sort its tokens.

        A layer has to where mu may override the expert, and where `experts_implementation` takes no plan. It also does
        in a step of one new token per row on the kernels: it then needs one launch or no order at all, which is less
        work than to divide a plan of all layers.
        """
        make_plan = ROUTING_PLANS.get(self.config._experts_implementation)
        if make_plan is None or self.config.use_mu_routing or is_transformed():
            return [None] * len(expert_ids)
        if self.config.routing_per_layer:
            if self.config._experts_implementation == "cggr" and expert_ids[0].shape[1] == 1:
                return [None] * len(expert_ids)
            return layer_routing_plans(make_plan, torch.stack(expert_ids).flatten(1), self.config.num_experts)
        return [RoutingPlan(*make_plan(expert_ids[0].flatten(), self.config.num_experts))] * len(expert_ids)
