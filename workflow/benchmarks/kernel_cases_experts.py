"""Kernel cases of `scripts/benchmark.py kernels`: the token-routed MLP beside its peers.

Rows {"op", "variant", "tokens", "pass", "flops", "ms", "low", "high"}: median and 20/80 % quantiles in milliseconds.
Up to GRAPH_TOKENS tokens a call is timed as replays of a CUDA graph (GPU time only) over several weight sets, which do
not fit the L2 together; beyond, as called, with the L2 flushed between calls. Peers: the experts of `transformers`
(grouped_mm eager and compiled, batched_mm) and a dense SwiGLU MLP of the same active width, eager and compiled. Token
ids are Zipf(1.0) over 32000, expert = id mod E. Our routing plan is made once per forward for all layers: "cggr" leaves
it out, "cggr + plan" and the library's calls have it in.
"""

import functools

import torch
import torch.nn.functional as F
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from complexity_deep.kernels.routing_plan import routing_plan
from complexity_deep.kernels.token_routed_gemm import token_routed_mlp
from complexity_deep.workflow.benchmarks.kernel_timing import normal, time_call, time_graph
from complexity_deep.workflow.benchmarks.model_speed import zipf_ids

GRAPH_TOKENS = 16384
BATCHED_TOKENS = 64  # batched_mm gathers one expert's weights per token: 1.1 GB at 64


def experts_module(implementation, gate_up_proj, down_proj):
    experts, hidden, inter = down_proj.shape
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inter, num_experts=experts, num_experts_per_tok=1)
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = gate_up_proj, down_proj
    return module


def variants(tokens, expert_ids, experts):
    """name -> function(x, gate_up_proj, down_proj); torch.compile sees fixed shapes."""
    order, offsets = routing_plan(expert_ids, experts)
    ones = torch.ones(tokens, 1, device="cuda", dtype=torch.bfloat16)
    modules = {}

    def dense(x, gate_up_proj, down_proj):
        gate, up = F.linear(x, gate_up_proj[0]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down_proj[0])

    def library(implementation, compiled=False):
        def call(x, gate_up_proj, down_proj):
            key = (implementation, compiled, id(gate_up_proj))
            if key not in modules:
                module = experts_module(implementation, gate_up_proj, down_proj)
                modules[key] = torch.compile(module, dynamic=False) if compiled else module
            return modules[key](x, expert_ids[:, None], ones)

        return call

    found = {
        "cggr": lambda *tensors: token_routed_mlp(*tensors, order, offsets),
        "dense": dense,
        "dense, compiled": torch.compile(dense, dynamic=False),
        "cggr + plan": lambda *tensors: token_routed_mlp(*tensors, *routing_plan(expert_ids, experts)),
        "grouped_mm": library("grouped_mm"),
        "grouped_mm, compiled": library("grouped_mm", compiled=True),
    }
    return found | ({"batched_mm": library("batched_mm")} if tokens <= BATCHED_TOKENS else {})


def cggr_rows(tokens, experts=4, hidden=2048, inter=1408, only=None, passes=("forward", "forward+backward")):
    """All variants (or those named in `only`) at one size."""
    torch._dynamo.reset()
    graph = tokens <= GRAPH_TOKENS
    count = (8 if tokens <= 512 else 4) if graph else 1  # 8 dense MLPs, 138 MB, are more than the L2
    shapes = [(tokens, hidden), (experts, 2 * inter, hidden), (experts, hidden, inter)]
    sets = [[normal(*shape, scale=scale) for shape, scale in zip(shapes, (1.0, 0.02, 0.02))] for _ in range(count)]
    upstream, rows = normal(tokens, hidden), []
    expert_ids = zipf_ids(32000, tokens, device="cuda") % experts
    for name, function in variants(tokens, expert_ids, experts).items():
        if only and name not in only:
            continue

        def forward(*tensors, function=function):
            with torch.no_grad():
                return function(*tensors)

        def step(*tensors, function=function):
            return torch.autograd.grad(function(*tensors), tensors, upstream)

        for what, call in (("forward", forward), ("forward+backward", step)):
            if what not in passes:
                continue
            inputs = [[torch.nn.Parameter(tensor, what != "forward") for tensor in tensors] for tensors in sets]
            times = (
                time_graph([functools.partial(call, *one) for one in inputs])
                if graph
                else time_call(functools.partial(call, *inputs[0]))
            )
            flops = (6 if what == "forward" else 18) * hidden * inter * tokens
            keys = {"op": f"MLP, {experts} experts", "variant": name, "tokens": tokens, "pass": what, "flops": flops}
            rows.append(keys | dict(zip(("ms", "low", "high"), times)))
    return rows
