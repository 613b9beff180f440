"""Repeated training steps as CUDA graphs. Without a GPU a stand-in records, which runs the passes at every replay."""

import contextlib
import gc
import inspect
import time
import weakref

import pytest
import torch
from accelerate.utils import compile_regions
from datasets import Dataset
from packaging import version
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments
from trl import SFTConfig

from complexity_deep import forward_graph_complexity_deep as forward_graphs
from complexity_deep import training_graph_complexity_deep as graphs
from complexity_deep.accelerated_complexity_deep import ACCELERATED, has_recordings
from complexity_deep.compatibility_complexity_deep import CACHE_NAME
from complexity_deep.workflow.training.fine_tuning import ChatTrainer
from complexity_deep.workflow.training.training_arguments import RENAMED
from complexity_deep.workflow.training.training_progress import TrainingProgress
from support import WIDTH, random_ids, tiny_tokenizer, triton_model

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


class StandIn:
    """Records like `record`, for a device that has no graphs: a replay runs the pass again."""

    def __call__(self, step, device, pool):
        result = step()
        if isinstance(result, Tensor):
            return lambda: self.forward(step, result), result
        gradients_of = inspect.getclosurevars(step).nonlocals["gradients_of"]
        return lambda: self.backward(gradients_of, result), result

    def forward(self, step, output):
        with torch.enable_grad():
            self.latest = step()
        output.detach().copy_(self.latest.detach())

    def backward(self, gradients_of, gradients):
        latest, self.latest = self.latest, None
        for gradient, new in zip(gradients, gradients_of(latest), strict=True):
            if gradient is not None:
                gradient.copy_(new)


@pytest.fixture
def steps(monkeypatch) -> list:
    """One entry for each recorded step, in which its replays of the backward pass are counted."""
    made, plain_step = [], graphs.TrainingStep

    class Counted(plain_step):
        def __init__(self, *arguments):
            if not CUDA:
                monkeypatch.setattr(graphs, "record", StandIn())
            super().__init__(*arguments)
            self.replays, replay = 0, self.backward

            def counted():
                self.replays += 1
                replay()

            self.backward = counted
            made.append(self)

    monkeypatch.setattr(graphs, "GRAPH_DEVICES", (DEVICE,))
    monkeypatch.setattr(forward_graphs, "CALLS_BEFORE", 0)
    monkeypatch.setattr(graphs, "TrainingStep", Counted)
    return made


@pytest.fixture
def few_kernels(monkeypatch) -> None:
    """Only the experts run on kernels where there is no GPU, for the interpreter takes long for all of them."""
    if not CUDA:
        monkeypatch.setitem(ACCELERATED, "triton", {"model": ACCELERATED["triton"]["model"]})


def loss_of(model, ids, **more) -> Tensor:
    return model(ids, labels=ids, use_cache=False, **more).loss


def gradients_of(model, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [x.grad.clone() for x in model.parameters() if x.grad is not None]


@contextlib.contextmanager
def without_kernels(model):
    model.set_kernels_implementation("eager")
    yield
    model.set_kernels_implementation("triton")


def eager_gradients(model, ids, **more) -> list[Tensor]:
    with without_kernels(model):
        return gradients_of(model, loss_of(model, ids, **more))


def check_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, **TOLERANCE)


@pytest.mark.parametrize("changes", [{}, {"num_experts": 1}, {"use_dynamics": False, "use_mu_routing": False}])
def test_gradients_of_replays_are_those_of_the_step(steps, monkeypatch, changes):
    monkeypatch.setattr(forward_graphs, "CALLS_BEFORE", 2)
    model, counts = triton_model(**changes).train(), []
    for seed in range(4):
        ids = random_ids(2, 5, seed=seed).to(DEVICE)
        found = gradients_of(model, loss_of(model, ids))
        counts.append(len(steps))
        check_equal(found, eager_gradients(model, ids))
    assert counts == [0, 0, 1, 1] and steps[0].replays >= 2


def test_packed_documents_and_the_number_of_labels(steps):
    model = triton_model().train()
    ids, other = random_ids(1, 6).to(DEVICE), random_ids(1, 6, seed=1).to(DEVICE)
    documents = torch.tensor([[0, 1, 2, 0, 1, 2]], device=DEVICE)
    one = torch.arange(6, device=DEVICE)[None]
    for positions in (documents, one):
        for given in (ids, other):
            more = {"position_ids": positions, "num_items_in_batch": torch.tensor(7, device=DEVICE)}
            check_equal(gradients_of(model, loss_of(model, given, **more)), eager_gradients(model, given, **more))
    assert len(steps) == 1 and steps[0].replays == 4


def test_a_mask_that_hides_nothing_is_left_out(steps):
    model = triton_model().train()
    ids = random_ids(2, 4).to(DEVICE)
    full, padded = torch.ones_like(ids), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=DEVICE)
    for mask in (full, padded):
        check_equal(
            gradients_of(model, loss_of(model, ids, attention_mask=mask)),
            eager_gradients(model, ids, attention_mask=mask),
        )
    assert len(steps) == 1 and steps[0].replays == 1


@pytest.mark.parametrize("way", ["as it comes", "compiled by layers", "compiled", "compiled, autocast"])
def test_trainer_replays_its_steps(steps, few_kernels, way, monkeypatch, tmp_path):
    compiled = {"torch_compile_backend": "eager", "tf32": False} if "compiled" in way else {}
    if compiled:
        torch._dynamo.reset()
        monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str("layers" in way))
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments changes it, for the whole process
    monkeypatch.setattr(forward_graphs, "CALLS_BEFORE", 2)
    rows = [{"input_ids": row, "attention_mask": [1] * 4, "labels": row} for row in random_ids(8, 4).tolist()]
    options = {"max_steps": 5, "per_device_train_batch_size": 2, "report_to": "none", "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), use_cpu=not CUDA, bf16="autocast" in way, **options, **compiled)
    Trainer(triton_model(), arguments, train_dataset=rows).train()
    assert len(steps) == 1 and steps[0].replays == 3


def test_fine_tuning_on_packed_conversations_replays_its_steps(steps, few_kernels, monkeypatch, tmp_path):
    """Their lengths differ, and those of the rows that they are packed into."""
    monkeypatch.setattr(forward_graphs, "CALLS_BEFORE", 2)
    conversations = [row[: 2 + index % 5] for index, row in enumerate(random_ids(40, 6).tolist())]
    options = {"max_steps": 5, "per_device_train_batch_size": 2, "report_to": "none", "save_strategy": "no"}
    options |= {"packing": True, "max_length": 8, "bf16": False, "router_aux_loss_coef": 0.0}
    options["activation_checkpointing" if RENAMED else "gradient_checkpointing"] = False
    ChatTrainer(
        model=triton_model(),
        args=SFTConfig(str(tmp_path), use_cpu=not CUDA, **options),
        train_dataset=Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in conversations]),
        processing_class=tiny_tokenizer(),
        settings={},
        progress=TrainingProgress(16, 1.0, 1),
    ).train()
    assert len(steps) == 1 and steps[0].replays == 3


def test_gradients_add_up_and_stay_what_they_were(steps):
    model = triton_model().train()
    first, second = (random_ids(1, 4, seed=seed).to(DEVICE) for seed in (0, 1))
    expected = [x + y for x, y in zip(eager_gradients(model, first), eager_gradients(model, second), strict=True)]
    model.zero_grad()
    loss_of(model, first).backward()
    kept = [x.grad for x in model.parameters()]
    copies = [None if x is None else x.clone() for x in kept]
    loss_of(model, second).backward()
    check_equal([x.grad for x in model.parameters() if x.grad is not None], expected)
    model.zero_grad()
    kept = [x for x in kept if x is not None]
    copies = [x.clone() for x in kept]
    loss_of(model, first).backward()
    assert all(torch.equal(x, y) for x, y in zip(kept, copies, strict=True))
    assert len(steps) == 1 and steps[0].replays == 3


def test_two_passes_before_a_backward_and_in_any_order(steps, few_kernels):
    model = triton_model().train()
    first, second = (random_ids(1, 4, seed=seed).to(DEVICE) for seed in (0, 1))
    expected = [eager_gradients(model, first), eager_gradients(model, second)]
    for order in ((0, 1), (1, 0)):
        losses = [loss_of(model, first), loss_of(model, second)]
        for index in order:
            check_equal(gradients_of(model, losses[index]), expected[index])
    assert steps[0].replays == 2  # of each pair, the first is replayed and the second runs as it is
    lost = loss_of(model, first)
    del lost  # no backward pass will come
    check_equal(gradients_of(model, loss_of(model, second)), expected[1])
    assert steps[0].replays == 3


def test_a_pass_that_still_waits_for_its_backward_pass_is_no_obstacle(steps, few_kernels, monkeypatch):
    """Its graph keeps autograd's nodes of the weights, which belong to the stream that it ran on."""
    monkeypatch.setattr(forward_graphs, "CALLS_BEFORE", 1)
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    expected, waiting = eager_gradients(model, ids), loss_of(model, ids)
    for loss in (loss_of(model, ids), waiting):
        check_equal(gradients_of(model, loss), expected)
    assert len(steps) == 1 and steps[0].replays == 1


def test_layers_that_share_a_module_or_a_weight(steps, few_kernels):
    """The recording puts weights of its own in their places, and the model's must come back to all of them."""
    model, ids = triton_model(num_hidden_layers=2).train(), random_ids(1, 4).to(DEVICE)
    first, second = model.model.layers
    second.mlp, second.self_attn.o_proj.weight = first.mlp, first.self_attn.o_proj.weight
    weights = list(model.parameters())
    for _ in range(2):
        check_equal(gradients_of(model, loss_of(model, ids)), eager_gradients(model, ids))
        assert all(x is y for x, y in zip(model.parameters(), weights, strict=True))
    assert len(steps) == 1 and steps[0].replays == 2


def test_a_second_backward_and_a_second_derivative(steps):
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    expected = eager_gradients(model, ids)
    loss = loss_of(model, ids)
    model.zero_grad()
    loss.backward(retain_graph=True)
    loss.backward()
    check_equal([x.grad / 2 for x in model.parameters() if x.grad is not None], expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()

    def penalty() -> Tensor:
        weight = model.model.layers[0].self_attn.o_proj.weight
        (gradient,) = torch.autograd.grad(loss_of(model, ids), weight, create_graph=True)
        return gradient.square().sum()

    found = gradients_of(model, penalty())
    model.set_kernels_implementation("eager")
    check_equal(found, gradients_of(model, penalty()))


def test_a_backward_pass_that_runs_anew_has_the_weights_of_the_forward_pass(steps):
    """The caller of `functional_call` has put back the model's own by then."""
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    given = {name: nn.Parameter(1.1 * x.detach()) for name, x in model.model.named_parameters()}

    def gradients(**options) -> list[Tensor]:
        states = functional_call(model.model, given, (ids,), {"use_cache": False}).last_hidden_state
        return list(torch.autograd.grad(states.square().sum(), list(given.values()), **options))

    for _ in range(2):  # one that sees the change, one that is recorded
        expected = gradients()
    assert len(steps) == 1 and steps[0].replays == 2
    check_equal(gradients(create_graph=True), expected)
    assert len(steps) == 1 and steps[0].replays == 2


def test_a_batch_of_gradients_at_once(steps):
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    weight = model.model.layers[0].self_attn.o_proj.weight

    def gradients() -> tuple[Tensor, ...]:
        states = model.model(ids, use_cache=False).last_hidden_state
        directions = torch.randn(3, *states.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        return torch.autograd.grad(states, weight, directions, is_grads_batched=True)

    found = gradients()
    model.set_kernels_implementation("eager")
    check_equal(found, gradients())
    assert len(steps) == 1


def test_no_pass_disturbs_a_backward_pass_that_is_not_over(steps, monkeypatch):
    """Gradients are copied before another thread may replay, and replaced memory stays until they are computed."""
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    weight, found, copy = model.model.layers[0].self_attn.o_proj.weight, [], torch._foreach_copy_
    loss_of(model, ids).backward()
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *x: found.append(steps[0].is_free()) or copy(*x))
    loss_of(model, ids).backward()
    assert found == [False] and steps[0].is_free()
    steps[0].forward = steps[0].backward = lambda: None  # as a recording, which holds no weight
    loss, memory = loss_of(model, ids), StorageWeakRef(weight.untyped_storage())
    weight.data = weight.data.clone()
    assert not memory.expired()
    del loss
    assert memory.expired()


def test_memory_of_frozen_weights_and_buffers_stays_until_the_backward_pass(steps):
    """The recorded backward pass reads them where they lay."""
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    layer = model.model.layers[0]
    frozen, buffer = layer.self_attn.o_proj.weight.requires_grad_(False), layer.mlp.mu_router.weight
    loss_of(model, ids).backward()
    steps[0].forward = steps[0].backward = lambda: None  # as a recording, which holds no weight
    loss = loss_of(model, ids)
    memory = [StorageWeakRef(x.untyped_storage()) for x in (frozen, buffer)]
    for x in (frozen, buffer):
        x.data = x.data.clone()
    assert len(steps) == 1 and not any(x.expired() for x in memory)
    del loss
    assert all(x.expired() for x in memory)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_weight_that_changes_before_the_backward_pass_is_refused(steps, few_kernels, is_frozen):
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    weight = model.model.layers[0].self_attn.o_proj.weight.requires_grad_(not is_frozen)
    loss_of(model, ids).backward()
    replay, steps[0].forward = steps[0].forward, lambda: None  # as a recording, which holds no weight
    loss = loss_of(model, ids)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    del loss
    for _ in range(1000):  # PyTorch's thread of a GPU lets go of the graph a moment after the error is raised
        if steps[0].is_free():
            break
        time.sleep(0.01)
    steps[0].forward, steps[0].replays = replay, 0
    check_equal(gradients_of(model, loss_of(model, ids)), eager_gradients(model, ids))
    assert steps[0].replays == 1


def test_what_changes_the_model_is_seen(steps, few_kernels):
    """Frozen weights, a replaced weight, one whose memory is read in another order, a hook."""
    model, ids = triton_model(num_hidden_layers=2).train(), random_ids(1, 4).to(DEVICE)
    layer = model.model.layers[1]
    loss_of(model, ids).backward()

    def is_followed(recorded: int) -> bool:
        for _ in range(2):  # one that sees the change, one that is recorded anew
            check_equal(gradients_of(model, loss_of(model, ids)), eager_gradients(model, ids))
        return len(steps) == recorded

    layer.self_attn.requires_grad_(False)
    assert is_followed(2)
    layer.self_attn.o_proj.weight = nn.Parameter(torch.eye(WIDTH, device=DEVICE))
    assert is_followed(3)
    weight = layer.self_attn.o_proj.weight
    weight.data.copy_(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))
    loss_of(model, ids).backward()
    weight.data = weight.data.t()
    assert is_followed(4)
    seen = []
    layer.mlp.register_forward_hook(lambda *_: seen.append(1))
    assert is_followed(4) and seen


def test_hooks_of_a_weight_see_each_gradient_once(steps):
    """A hook that changes the gradient; and one that steps an optimizer in the backward pass, which is no obstacle."""
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    weight, seen = model.model.layers[0].self_attn.o_proj.weight, []
    weight.register_post_accumulate_grad_hook(lambda x: seen.append(x.grad.clone()))
    for _ in range(2):
        found = gradients_of(model, loss_of(model, ids))
    assert len(seen) == 2 and steps[0].replays == 2
    check_equal(found, eager_gradients(model, ids))
    hook = weight.register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)
    expected = eager_gradients(model, ids)
    for _ in range(3):
        seen.clear()
        check_equal(gradients_of(model, loss_of(model, ids)), expected)
        assert len(seen) == 2
    hook.remove()
    for _ in range(2):
        check_equal(gradients_of(model, loss_of(model, ids)), eager_gradients(model, ids))
    assert len(steps) == 2


def test_a_weight_that_another_network_computes_gets_its_gradient(steps):
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    projection, scale = model.model.layers[0].self_attn.o_proj, torch.ones((), device=DEVICE, requires_grad=True)
    start = projection.weight.detach()
    del projection.weight
    gradients = []
    for _ in range(3):
        projection.weight = start * scale
        gradients += torch.autograd.grad(loss_of(model, ids), scale)
    assert gradients[0] != 0 and not steps
    check_equal(gradients[1:], gradients[:1] * 2)


def test_a_loop_without_further_arguments_is_replayed(steps):
    """In training mode a model makes no cache by itself."""
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    outputs = model(ids, labels=ids)
    check_equal(gradients_of(model, outputs.loss), eager_gradients(model, ids))
    assert len(steps) == steps[0].replays == 1 and outputs.get(CACHE_NAME) is None
    assert model(ids, use_cache=True)[CACHE_NAME].get_seq_length() == 4


@pytest.mark.parametrize("options", [{"backend": "aot_eager"}, {"backend": "eager", "dynamic": False}], ids=str)
def test_a_model_compiled_as_a_whole_is_replayed(steps, options):
    torch._dynamo.reset()
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    compiled = torch.compile(model, **options)
    for seed in range(3):
        ids = random_ids(1, 4, seed=seed).to(DEVICE)
        check_equal(gradients_of(model, loss_of(compiled, ids)), eager_gradients(model, ids))
    assert len(steps) == 1 and steps[0].replays == 3
    found, expected = loss_of(compiled, ids), loss_of(model, ids)  # which has a recording of its own
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert len(steps) == 2
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, **TOLERANCE)


WHOLE = [{"fullgraph": True}, {"dynamic": True}, {"mode": "reduce-overhead"}, {"backend": "cudagraphs"}]


@pytest.mark.parametrize("options", WHOLE, ids=str)
def test_a_compiled_graph_that_must_be_whole_or_makes_graphs_of_its_own_is_left_alone(steps, options):
    torch._dynamo.reset()
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    compiled = torch.compile(model, **({} if "mode" in options else {"backend": "eager"}) | options)
    check_equal(gradients_of(model, loss_of(compiled, ids)), eager_gradients(model, ids))
    assert not steps


def through_a_condition(model, ids) -> Tensor:
    logits = lambda x: model(x, use_cache=False).logits  # noqa: E731
    with torch.no_grad():
        return torch.cond(ids.sum() > 0, logits, logits, (ids,))


def through_checkpoint(model, ids) -> Tensor:
    return checkpoint(lambda x: model(x).logits, ids, use_reentrant=False)


def through_a_transform(model, ids) -> Tensor:
    norm = model.model.norm.weight.detach()
    logits = lambda x: functional_call(model, {"model.norm.weight": x}, (ids,), {"use_cache": False}).logits  # noqa: E731
    return torch.func.grad(lambda x: logits(x).square().sum())(norm)


def with_checkpointed_layers(model, ids) -> Tensor:
    return model(ids).logits


# torch 2.11 cannot trace these with the library's own models either.
OLD_TORCH = pytest.mark.skipif(version.parse(torch.__version__) < version.parse("2.12"), reason="torch 2.11")


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(through_a_condition, marks=OLD_TORCH),
        pytest.param(through_checkpoint, marks=OLD_TORCH),
        through_a_transform,
        with_checkpointed_layers,
    ],
)
def test_what_is_traced_in_one_piece_or_computed_twice_stays_one_compiled_graph(steps, few_kernels, way):
    torch._dynamo.reset()
    counters.clear()
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    if way is with_checkpointed_layers:
        model.gradient_checkpointing_enable()
    counter = CompileCounterWithBackend("eager")
    found = torch.compile(lambda x: way(model, x), backend=counter)(ids)
    torch.testing.assert_close(found, way(model, ids), **TOLERANCE)
    assert counter.frame_count == 1 and not counters["graph_break"] and not steps


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=4)
def test_a_model_compiled_as_a_whole_is_compiled_twice_for_all_lengths(steps, few_kernels):
    """The decoder and the loss, each in training and in evaluation. A mask and a recording change nothing about it."""
    torch._dynamo.reset()
    model, counter = triton_model(), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    for length in (5, 5, 6, 6, 7, 7):
        ids = random_ids(2, length).to(DEVICE)
        for trains in (True, False):
            with torch.set_grad_enabled(trains):
                loss = loss_of(compiled.train(trains), ids, attention_mask=torch.ones_like(ids))
            if trains:
                loss.backward()
                model.zero_grad()
    assert counter.frame_count == 8 and len(steps) == 3


def test_layers_compiled_by_accelerate_are_recorded(steps):
    model, ids = compile_regions(triton_model(), backend="aot_eager").train(), random_ids(1, 4).to(DEVICE)
    for _ in range(2):
        found = gradients_of(model, loss_of(model, ids))
    assert len(steps) == 1 and steps[0].replays == 2
    check_equal(found, eager_gradients(model, ids))


def test_autocast_is_part_of_what_is_recorded(steps):
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    loss_of(model, ids).backward()
    with torch.autocast(DEVICE, torch.bfloat16):
        losses = [loss_of(model, ids) for _ in range(2)]
        hidden = model.model(ids, use_cache=False).last_hidden_state
    assert len(steps) == 2
    check_equal(gradients_of(model, losses[0]), gradients_of(model, losses[1]))  # a replay, and the pass as it is
    check_equal(gradients_of(model, loss_of(model, ids)), eager_gradients(model, ids))
    assert hidden.requires_grad


def test_a_backward_pass_is_recorded_outside_of_autocast(steps, monkeypatch):
    model, ids, found, plain = triton_model().train(), random_ids(1, 4).to(DEVICE), [], torch.autograd.grad

    def gradients(*arguments, **options):
        found.append(torch.is_autocast_enabled(DEVICE))
        return plain(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", gradients)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss_of(model, ids)
    assert len(steps) == 1 and found and not any(found)


def test_a_recording_that_fails_leaves_no_casts_without_values(steps, monkeypatch):
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    weights = [x.data for x in model.parameters()]

    def fail(step, *_):
        values = [x.clone() for x in weights]
        torch._foreach_zero_(weights)  # what is cast now has other values than those of the weights
        step()
        torch._foreach_copy_(weights, values)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(graphs, "TrainingStep", graphs.TrainingStep.__base__)
    monkeypatch.setattr(graphs, "record", fail)
    with torch.autocast(DEVICE, torch.bfloat16):
        losses = [loss_of(model, ids)]
    with torch.autocast(DEVICE, torch.bfloat16):
        losses.append(loss_of(model, ids))
    torch.testing.assert_close(*losses)


def test_calls_that_ask_for_more_run_as_they_are(steps):
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    mask, embeds = torch.ones(1, 1, 4, 4, device=DEVICE).bool(), model.model.embed_tokens(ids).detach()
    embeds.requires_grad_()
    asked = {"use_cache": True, "is_causal": False, "attention_mask": mask, "routing_ids": ids}
    for more in ({name: value} for name, value in (asked | {"output_hidden_states": True}).items()):
        model(ids, **{"use_cache": False, **more}).logits.sum().backward()
    model(inputs_embeds=embeds, routing_ids=ids, use_cache=False).logits.sum().backward()
    checkpoint(lambda x: model(x, use_cache=False).logits, ids, use_reentrant=False).sum().backward()
    with torch.autograd.graph.save_on_cpu():
        loss_of(model, ids).backward()
    model.gradient_checkpointing_enable()
    loss_of(model, ids).backward()
    model = triton_model(attention_dropout=0.1).train()
    loss_of(model, ids).backward()
    with torch.no_grad():
        loss_of(triton_model().train(), ids)
    assert not steps


def test_dropout_that_only_the_modules_have_is_left_alone(steps, caplog):
    """An attempt to record it would draw random numbers that the step itself does not draw."""
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    model.model.layers[0].self_attn.attention_dropout = 0.5
    torch.manual_seed(0)
    loss_of(model, ids)
    found = torch.rand(3, device=DEVICE)
    model.set_cuda_graphs(False)
    torch.manual_seed(0)
    loss_of(model, ids)
    assert torch.equal(found, torch.rand(3, device=DEVICE)) and not steps and not caplog.records


def test_a_frozen_model_is_left_alone(steps, caplog):
    model, ids = triton_model(tie_word_embeddings=False).train(), random_ids(1, 4).to(DEVICE)
    model.model.requires_grad_(False)
    loss_of(model, ids).backward()
    assert model.lm_head.weight.grad is not None and not steps and not caplog.records


def test_a_new_weight_in_the_place_of_a_deleted_one_gets_its_gradient(steps):
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    loss_of(model, ids).backward()
    projection = model.model.layers[0].self_attn.o_proj
    (index,) = [i for i, x in enumerate(steps[0].weights) if x() is projection.weight]
    memory = projection.weight.data
    del projection.weight
    projection.weight = nn.Parameter(memory)
    # As where Python gives the new one the id of the old one, which the stand-in still holds.
    graphs._GRAPHS[model.model].state = forward_graphs.state_of(model.model)
    steps[0].weights[index] = weakref.ref(nn.Parameter(memory))
    assert steps[0].weights[index]() is None
    loss_of(model, ids).backward()
    assert projection.weight.grad is not None


def test_graphs_can_be_turned_off_and_are_freed(steps, few_kernels):
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    loss_of(model, ids).backward()
    assert graphs.is_replayed(model.model) and len(steps) == 1
    model.set_cuda_graphs(False)
    assert model.model not in graphs._GRAPHS
    for _ in range(2):
        check_equal(gradients_of(model, loss_of(model, ids)), eager_gradients(model, ids))
    assert not graphs.is_replayed(model.model) and len(steps) == 1
    model.set_cuda_graphs(True)
    for _ in range(2):  # one that sees the change, one that is recorded
        loss_of(model, ids).backward()
    assert graphs.is_replayed(model.model) and len(steps) == 2


@pytest.mark.parametrize("trains", [True, False])
def test_recordings_make_room_for_a_pass_that_runs_out_of_memory(steps, monkeypatch, trains):
    """Without recordings there is nothing to give up, and the error stays."""
    model, ids, larger = triton_model().train(), random_ids(1, 4).to(DEVICE), random_ids(2, 6).to(DEVICE)
    with without_kernels(model):
        expected, forward = loss_of(model, larger).detach(), nn.Embedding.forward
    loss_of(model, ids).backward()
    assert has_recordings(model.model)

    def full(*arguments):
        if needs_all or has_recordings(model.model):
            raise torch.OutOfMemoryError("no room")
        return forward(*arguments)

    monkeypatch.setattr(nn.Embedding, "forward", full)
    with torch.set_grad_enabled(trains):
        needs_all = False
        torch.testing.assert_close(loss_of(model, larger), expected, **TOLERANCE)
        assert len(steps) == 1 and not model.model.takes_cuda_graphs
        needs_all = True
        with pytest.raises(torch.OutOfMemoryError):
            loss_of(model, ids)


def test_a_model_that_moves_leaves_no_graphs_behind(steps):
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    loss_of(model, ids).backward()
    model.to(DEVICE)
    assert model.model in graphs._GRAPHS
    model.to("meta")
    assert model.model not in graphs._GRAPHS


def test_what_cannot_be_recorded_runs_as_it_is(steps, monkeypatch):
    """CUDA refuses; or the replay gives something else than the pass."""

    def refuse(*_):
        raise torch.OutOfMemoryError("no memory")

    ids, tried = random_ids(1, 4).to(DEVICE), []
    monkeypatch.setattr(graphs, "TrainingStep", graphs.TrainingStep.__base__)
    monkeypatch.setattr(graphs, "record", lambda *_: tried.append(1) or refuse())
    for free in (2**60, 0):
        monkeypatch.setattr(graphs, "free_bytes", lambda _, free=free: free)
        model = triton_model().train()
        for _ in range(2):
            check_equal(gradients_of(model, loss_of(model, ids)), eager_gradients(model, ids))
        assert len(tried) == 1  # once, and not at all where there is no memory
    with pytest.raises(RuntimeError, match="does not give"):
        graphs._compare(torch.ones(3), torch.ones(3), torch.ones(2), torch.tensor([1.0, 2.0]))
    with pytest.raises(RuntimeError, match="does not give"):
        graphs._compare(torch.ones(3), torch.full((3,), torch.nan), torch.ones(2), torch.ones(2))


def test_a_model_that_nobody_holds_is_freed_with_its_graphs(steps):
    if not CUDA:
        pytest.skip("the stand-in holds the model")
    model, ids = triton_model().train(), random_ids(1, 4).to(DEVICE)
    loss_of(model, ids).backward()
    base, held = weakref.ref(model.model), len(graphs._GRAPHS)
    steps.clear()
    del model
    gc.collect()
    assert base() is None and len(graphs._GRAPHS) < held
