"""The expert that mu routing takes, and the order of tokens by expert, in Triton.

    chosen[t] = argmax_e(base_logit [e = expert of the table] + mu[t] . router[e])      `mu_route`

    order    [T]   int32  order[r] = token whose row stands at sorted position r (stable: by expert, then by token)
    offsets  [E+1] int32  rows offsets[e] .. offsets[e+1]-1 of the sorted order belong to expert e

T tokens, H hidden size, E experts. Up to 512 tokens, one kernel counts for every token how many come before it. With
more tokens, one kernel counts each expert's tokens in blocks, PyTorch sums the counts, and another kernel places the
tokens. The host never waits for the device.
"""

import torch
from torch import Tensor

try:
    import triton.language as tl
except ImportError:  # the guard lets a checkpoint that ships this file load where there is no Triton
    raise

from .kernel_launch import cdiv, kernel, next_power_of_2, on_its_device
from .op_registration import custom_op

MAX_ROUTED = 128  # experts whose scores a program of mu_route_kernel holds at once


@kernel("num_tokens", "ids")
def routing_plan_kernel(ids, order, offsets, num_tokens, num_experts, BLOCK: tl.constexpr):
    """Few tokens: a token's sorted position is the number of tokens before it; offsets[e], of ids below e."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = token - tl.cdiv(num_tokens, BLOCK) * BLOCK  # programs past the tokens count for `offsets`
    key = tl.where(expert < 0, tl.load(ids + token, mask=token < num_tokens, other=0).to(tl.int32), expert)
    tie = tl.where(expert < 0, token, 0)
    position = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_tokens, BLOCK):
        other = start + tl.arange(0, BLOCK)
        value = tl.load(ids + other, mask=other < num_tokens, other=2**30).to(tl.int32)
        before = (value[None, :] < key[:, None]) | ((value[None, :] == key[:, None]) & (other[None, :] < tie[:, None]))
        position += tl.sum(before.to(tl.int32), axis=1)
    tl.store(order + position, token, mask=token < num_tokens)
    tl.store(offsets + expert, position, mask=(expert >= 0) & (expert <= num_experts))


@kernel("num_tokens")
def routing_count_kernel(ids, counts, num_tokens, num_experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """counts [E, blocks]: tokens of each expert in each block of BLOCK tokens."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, EXPERTS)
    value = tl.load(ids + token, mask=token < num_tokens, other=num_experts).to(tl.int32)
    cells = counts + experts * tl.num_programs(0) + tl.program_id(0)
    tl.store(cells, tl.histogram(value, EXPERTS), mask=experts < num_experts)


@kernel("num_tokens")
def routing_place_kernel(
    ids, counts, ends, order, offsets, num_tokens, num_experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):
    """ends [E, blocks] = running sum of counts: where each expert's tokens of each block end in the sorted order."""
    pid, blocks = tl.program_id(0), tl.num_programs(0)
    index, experts = tl.arange(0, BLOCK), tl.arange(0, EXPERTS)
    token = pid * BLOCK + index
    valid = token < num_tokens
    value = tl.load(ids + token, mask=valid, other=num_experts).to(tl.int32)
    earlier = (value[None, :] == value[:, None]) & (index[None, :] < index[:, None])
    cell = value * blocks + pid
    start = tl.load(ends + cell, mask=valid, other=0) - tl.load(counts + cell, mask=valid, other=0)
    tl.store(order + start + tl.sum(earlier.to(tl.int32), axis=1), token, mask=valid)
    bound = tl.load(ends + experts * blocks - 1, mask=(experts > 0) & (experts <= num_experts), other=0)
    tl.store(offsets + experts, bound, mask=experts <= tl.where(pid == 0, num_experts, -1))


@kernel("T", "ids_ptr")
def mu_route_kernel(
    mu_ptr, router_ptr, ids_ptr, chosen_ptr, T, H, E, base_logit, BT: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr
):
    """chosen [T] of mu [T, H], router [E, H] and ids [T]; logits are rounded to the dtype of mu, as a linear's are."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_k, o_e = tl.arange(0, BK), tl.arange(0, BE)
    acc = tl.zeros([BT, BE], tl.float32)
    for k in range(0, H, BK):
        m_k = (o_k < H - k)[None, :]
        mu = tl.load(mu_ptr + token[:, None] * H + k + o_k[None, :], mask=(token < T)[:, None] & m_k, other=0.0)
        router = tl.load(router_ptr + o_e[:, None] * H + k + o_k[None, :], mask=(o_e < E)[:, None] & m_k, other=0.0)
        acc = tl.dot(mu, tl.trans(router), acc, input_precision="ieee")
    base = tl.load(ids_ptr + token, mask=token < T, other=0)
    scores = tl.where(o_e[None, :] == base[:, None], base_logit, 0.0) + acc.to(mu_ptr.dtype.element_ty).to(tl.float32)
    scores = tl.where(scores == scores, scores, float("inf"))  # NaN counts as the largest, as in torch
    chosen = tl.argmax(tl.where((o_e < E)[None, :], scores, float("-inf")), 1)  # ties: the lowest
    tl.store(chosen_ptr + token, chosen.to(chosen_ptr.dtype.element_ty), mask=token < T)


@custom_op("mu_route")
@on_its_device
def mu_route(mu: Tensor, router: Tensor, expert_ids: Tensor, base_logit: float) -> Tensor:
    """The expert of each token, where mu may override that of the routing table.

    mu: [T, H]. router: [E, H] of the same dtype, E up to MAX_ROUTED. expert_ids: [T] integers, those of the table.

    Returns: [T] of the dtype of expert_ids: argmax over experts e of base_logit [e = expert_ids] + mu . router[e].
    """
    (T, H), E = mu.shape, router.shape[0]
    chosen = torch.empty_like(expert_ids)
    mu_route_kernel.launch(
        (cdiv(T, 16),), mu, router, expert_ids.long(), chosen, T, H, E, base_logit,
        BT=16, BK=128, BE=max(16, next_power_of_2(E)), num_warps=4,
    )  # fmt: skip
    return chosen


@mu_route.register_fake
def _(mu, router, expert_ids, base_logit):
    return torch.empty_like(expert_ids)


@custom_op("routing_plan")
@on_its_device
def routing_plan(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort tokens by expert: `expert_ids` [T] integers in 0..num_experts-1 -> (`order`, `offsets`), both int32.

    Stable, like `routing_plan_reference`. One launch up to 512 tokens; beyond, count, running sum, place.
    """
    expert_ids, tokens = expert_ids.contiguous().long(), expert_ids.shape[0]
    order = expert_ids.new_empty(tokens, dtype=torch.int32)
    offsets = expert_ids.new_empty(num_experts + 1, dtype=torch.int32)
    if tokens <= 512:
        grid = (cdiv(tokens, 64) + cdiv(num_experts + 1, 64),)
        routing_plan_kernel.launch(grid, expert_ids, order, offsets, tokens, num_experts, BLOCK=64)
        return order, offsets
    blocks = cdiv(tokens, 128)
    counts = expert_ids.new_empty(num_experts, blocks, dtype=torch.int32)
    sizes = {"EXPERTS": next_power_of_2(num_experts + 1), "BLOCK": 128}
    routing_count_kernel.launch((blocks,), expert_ids, counts, tokens, num_experts, **sizes)
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    routing_place_kernel.launch((blocks,), expert_ids, counts, ends, order, offsets, tokens, num_experts, **sizes)
    return order, offsets


@routing_plan.register_fake
def _(expert_ids, num_experts):
    order = expert_ids.new_empty(expert_ids.shape[0], dtype=torch.int32)
    return order, expert_ids.new_empty(num_experts + 1, dtype=torch.int32)
