"""Two gloo processes on the CPU compute what one process computes: DDP, FSDP2, tensor and expert parallelism."""

import os
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from complexity_deep import ComplexityDeepForCausalLM
from support import meeting_place, random_ids, tiny_model

WORLD_SIZE = 2
VARIANTS = {
    "published": {},
    "router learns, mu norm": {"mu_router_gradient": True, "use_mu_norm": True},
    "plain token-routed": {"use_mu_guidance": False, "use_dynamics": False, "use_mu_routing": False},
    "dense": {"use_token_routed_mlp": False, "use_dynamics": False},
    "values, routing per layer": {
        "value_embedding_layers": [0, 2],
        "routing": "random",
        "routing_per_layer": True,
        "use_mu_routing": False,
    },
    "shared expert, untied": {"shared_expert_intermediate_size": 48, "tie_word_embeddings": False},
}
CHECKPOINTING = {"off": None, "non-reentrant": False, "reentrant": True}  # use_reentrant


def join(rank: int, meeting: dict[str, str]) -> None:
    os.environ |= {**meeting, "WORLD_SIZE": str(WORLD_SIZE), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=240))  # a rank left alone fails, and does not hang


@pytest.fixture(scope="module")
def ranks():
    """`ranks(job, *args)` runs the module-level function `job` in both processes and returns [result of rank 0, 1]."""
    with meeting_place() as meeting:
        pools = [ProcessPoolExecutor(1, get_context("spawn"), join, (rank, meeting)) for rank in range(WORLD_SIZE)]

        def run(job, *args):
            futures = [pool.submit(job, *args) for pool in pools]
            return [future.result() for future in futures]

        yield run
        for pool in pools:
            pool.submit(dist.destroy_process_group)
            pool.shutdown()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with a saved tiny model of each variant; 256 ids, because 5.17 splits the vocabulary only evenly."""
    folder = tmp_path_factory.mktemp("distributed")
    for name, overrides in VARIANTS.items():
        tiny_model(std=0.1, vocab_size=256, **overrides).save_pretrained(folder / name)
    return folder


def batch() -> torch.Tensor:
    return random_ids(2 * WORLD_SIZE, 16, vocab_size=256)


def own_rows(ids: torch.Tensor) -> torch.Tensor:
    return ids.chunk(WORLD_SIZE)[dist.get_rank()]


def train_step(model: torch.nn.Module, ids: torch.Tensor) -> float:
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.item()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whole gradients by parameter name; a parameter without one is left out."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
    return found


def single_process(folder) -> tuple[float, dict[str, torch.Tensor]]:
    model = ComplexityDeepForCausalLM.from_pretrained(folder).train()
    return train_step(model, batch()), gradients(model)


def worst_gradient_error(expected: dict, found: dict) -> tuple[float, str]:
    """Largest norm of a difference, relative to the norm of the expected gradient (an idle expert has none)."""
    assert found.keys() == expected.keys()
    errors = {
        name: ((found[name] - grad).norm() / grad.norm().clamp(min=1e-6)).item() for name, grad in expected.items()
    }
    worst = max(errors, key=errors.get)
    return errors[worst], worst


def all_ranks_mean(value: float) -> float:
    mean = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(mean)
    return (mean / WORLD_SIZE).item()


def enable_checkpointing(model, use_reentrant: bool) -> None:
    name = "activation_checkpointing_enable"  # transformers 5.17 has the older name only
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def ddp_job(folder, use_reentrant: bool | None):
    """Two backward passes, since DDP complains about a parameter without a gradient at the next forward."""
    expected_loss, expected = single_process(folder)
    model = ComplexityDeepForCausalLM.from_pretrained(folder).train()
    if use_reentrant is not None:
        enable_checkpointing(model, use_reentrant)
    replica = DistributedDataParallel(model, find_unused_parameters=False)
    errors = []
    for _ in range(2):
        replica.zero_grad()
        loss = all_ranks_mean(train_step(replica, own_rows(batch())))
        errors.append((abs(loss - expected_loss), *worst_gradient_error(expected, gradients(model))))
    return max(errors)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ddp_gives_the_loss_and_gradients_of_one_process(ranks, checkpoints, variant, checkpointing):
    for loss_error, gradient_error, name in ranks(ddp_job, checkpoints / variant, CHECKPOINTING[checkpointing]):
        assert loss_error < 1e-5
        assert gradient_error < 1e-4, name


def fresh_ddp_job():
    """As `ddp_job`, for a new model: `from_pretrained` turns requires_grad on, a constructor does not."""
    model = tiny_model(std=0.1, vocab_size=256).train()
    train_step(model, batch())
    expected = gradients(model)
    assert expected.keys() == {name for name, _ in model.named_parameters()}
    model.zero_grad()
    enable_checkpointing(model, use_reentrant=False)
    replica = DistributedDataParallel(model, find_unused_parameters=False)
    for _ in range(2):
        replica.zero_grad()
        train_step(replica, own_rows(batch()))
    return worst_gradient_error(expected, gradients(model))


def test_ddp_trains_a_new_model_with_gradient_checkpointing(ranks):
    for gradient_error, name in ranks(fresh_ddp_job):
        assert gradient_error < 1e-4, name


def fsdp_job(folder, use_reentrant: bool | None, through_the_library: bool):
    expected_loss, expected = single_process(folder)
    if through_the_library:
        config = DistributedConfig(fsdp_size=WORLD_SIZE)
        model = ComplexityDeepForCausalLM.from_pretrained(folder, distributed_config=config).train()
    else:
        model = ComplexityDeepForCausalLM.from_pretrained(folder).train()
    if use_reentrant is not None:
        enable_checkpointing(model, use_reentrant)
    if not through_the_library:
        mesh = init_device_mesh("cpu", (WORLD_SIZE,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    sharded = model.model.layers[1].mlp.experts.gate_up_proj
    assert sharded.to_local().numel() * WORLD_SIZE == sharded.numel()
    loss = all_ranks_mean(train_step(model, own_rows(batch())))
    return abs(loss - expected_loss), *worst_gradient_error(expected, gradients(model))


@pytest.mark.parametrize("checkpointing", ["off", "non-reentrant"])
def test_fsdp2_by_hand_gives_the_loss_and_gradients_of_one_process(ranks, checkpoints, checkpointing):
    results = ranks(fsdp_job, checkpoints / "published", CHECKPOINTING[checkpointing], False)
    for loss_error, gradient_error, name in results:
        assert loss_error < 1e-5
        assert gradient_error < 1e-4, name


def test_fsdp2_through_the_library_gives_the_loss_and_gradients_of_one_process(ranks, checkpoints):
    for loss_error, gradient_error, name in ranks(fsdp_job, checkpoints / "published", None, True):
        assert loss_error < 1e-5
        assert gradient_error < 1e-4, name


def sharded_job(folder, saved, options: dict):
    """Load with `DistributedConfig(**options)`; compare logits, loss, gradients, and the weights it saves."""
    reference = ComplexityDeepForCausalLM.from_pretrained(folder)
    model = ComplexityDeepForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**options))
    ids = batch()
    with torch.no_grad():
        expected, logits = reference(ids).logits, model(ids).logits
        tokens = [m.generate(ids[:, :4], max_new_tokens=4, do_sample=False) for m in (reference, model)]
    expected_loss, expected_gradients = single_process(folder)
    loss = train_step(model.train(), ids)
    report = {
        "logits": ((logits - expected).abs().max() / expected.abs().max()).item(),
        "tokens": torch.equal(*tokens),
        "loss": abs(loss - expected_loss),
        "gradient": worst_gradient_error(expected_gradients, gradients(model)),
        "query rows here": model.model.layers[1].self_attn.q_proj.weight.to_local().shape[0]
        if hasattr(model.model.layers[1].self_attn.q_proj.weight, "to_local")
        else model.config.hidden_size,
        "experts here": model.model.layers[1].mlp.experts.gate_up_proj.to_local().shape[0]
        if model.config.is_routed
        else None,
    }
    model.save_pretrained(saved)
    dist.barrier()
    state = ComplexityDeepForCausalLM.from_pretrained(saved).state_dict()
    report["weights"] = all(torch.equal(state[name], tensor) for name, tensor in reference.state_dict().items())
    return report


def check_sharded(reports, query_rows: int, experts: int | None):
    for report in reports:
        assert report["query rows here"] == query_rows and report["experts here"] == experts
        assert report["logits"] < 1e-5
        assert report["tokens"]
        assert report["loss"] < 1e-5
        assert report["gradient"][0] < 1e-4, report["gradient"][1]
        assert report["weights"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensor_parallel_equals_one_process(ranks, checkpoints, tmp_path, variant):
    experts = None if variant == "dense" else 4  # every rank holds a slice of every expert
    check_sharded(ranks(sharded_job, checkpoints / variant, tmp_path, {"tp_size": 2}), 32, experts)


def test_tensor_parallel_from_the_published_layout_equals_one_process(ranks, checkpoints, tmp_path):
    model = ComplexityDeepForCausalLM.from_pretrained(checkpoints / "published")
    model.save_published_format(tmp_path / "original")
    check_sharded(ranks(sharded_job, tmp_path / "original", tmp_path / "saved", {"tp_size": 2}), 32, 4)


needs_expert_dispatch = pytest.mark.skipif(
    "ep_dispatch_experts" not in ALL_PARALLEL_STYLES,
    reason=f"transformers {transformers.__version__} splits experts only behind a router module that returns "
    "(logits, scores, indices); a router that reads a table of token ids has no such output",
)


@needs_expert_dispatch
@pytest.mark.parametrize("implementation", ["auto", "all_to_all", "all_reduce"])
@pytest.mark.parametrize(
    "variant", ["published", "router learns, mu norm", "plain token-routed", "shared expert, untied"]
)
def test_expert_and_tensor_parallel_equal_one_process(ranks, checkpoints, tmp_path, variant, implementation):
    options = {"tp_size": 2, "ep_size": 2, "ep_implementation": implementation}
    check_sharded(ranks(sharded_job, checkpoints / variant, tmp_path, options), 32, 2)


def inference_job(folder, load: dict):
    """Largest difference of logits from those of the whole model, whether both generate alike, and what is here.

    Logits are those of ids, and of embeddings without ids, which are routed by their nearest rows.
    """
    reference = ComplexityDeepForCausalLM.from_pretrained(folder)
    model = ComplexityDeepForCausalLM.from_pretrained(folder, **load)
    ids, alike = batch(), []
    with torch.no_grad():
        expected, embeds = reference(ids).logits, reference.get_input_embeddings()(ids)
        logits = torch.stack((model(ids).logits, model(inputs_embeds=embeds).logits))
        for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
            options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options}
            alike.append(torch.equal(*(each.generate(ids[:, :4], **options) for each in (reference, model))))
    weights = (model.model.layers[1].self_attn.q_proj.weight, model.model.layers[1].mlp.experts.gate_up_proj)
    shapes = [tuple(weight.to_local().shape) for weight in weights]
    return ((logits - expected).abs().max() / expected.abs().max()).item(), alike, shapes


KERNELS = {"kernels_implementation": "triton", "experts_implementation": "cggr"}
DIVIDED = {  # what is given at load, and how many experts a process then has
    "tp_plan": ({"tp_plan": "auto"}, 4),
    "configuration": ({"distributed_config": DistributedConfig(tp_plan="auto", tp_size=2)}, 4),
    "on the kernels": ({"tp_plan": "auto", **KERNELS}, 4),
}
if "ep_dispatch_experts" in ALL_PARALLEL_STYLES:
    experts = {"distributed_config": DistributedConfig(tp_size=2, ep_size=2)}
    DIVIDED |= {"experts": (experts, 2), "experts on the kernels": ({**experts, **KERNELS}, 2)}


@pytest.mark.parametrize("division", DIVIDED)
@pytest.mark.filterwarnings("ignore:Passing `tp_plan`:FutureWarning")
def test_inference_of_a_divided_model_equals_one_process(ranks, checkpoints, division):
    load, experts = DIVIDED[division]
    if "kernels_implementation" in load:
        pytest.importorskip("triton")
    for error, alike, ((rows, _), (here, *_)) in ranks(inference_job, checkpoints / "published", load):
        assert error < 1e-5 and alike == [True, True]
        assert rows == 32 and here == experts


def data_and_expert_parallel_job(folder):
    """Each rank holds its own rows of the batch and half of the experts; everything else is FSDP-sharded."""
    expected_loss, expected = single_process(folder)
    config = DistributedConfig(fsdp_size=WORLD_SIZE, ep_size=WORLD_SIZE)
    model = ComplexityDeepForCausalLM.from_pretrained(folder, distributed_config=config).train()
    loss = all_ranks_mean(train_step(model, own_rows(batch())))
    return abs(loss - expected_loss), *worst_gradient_error(expected, gradients(model))


@needs_expert_dispatch
def test_expert_parallel_over_data_parallel_ranks_equals_one_process(ranks, checkpoints):
    for loss_error, gradient_error, name in ranks(data_and_expert_parallel_job, checkpoints / "published"):
        assert loss_error < 1e-5
        assert gradient_error < 1e-4, name
