"""Kernels compiled together before the first call: which, for which numbers of tokens, and how often."""

import contextlib
import inspect
import itertools
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from complexity_deep import accelerated_complexity_deep as accelerated
from support import tiny_config, tiny_model

pytest.importorskip("triton")
import triton

from complexity_deep.kernels import kernel_launch
from complexity_deep.kernels.first_call import compile_layer_kernels
from complexity_deep.kernels.token_routed_gemm import token_classes


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """Names of the kernels that a GPU like Hopper would have compiled."""
    names = []

    class Pool(contextlib.nullcontext):
        def submit(self, function, *args):
            if inspect.ismethod(function):  # of a kernel; the other is what loads Triton's driver
                names.append(function.__self__.__name__)
            done = Future()
            done.set_result(None)
            return done

    for module in [module for name, module in sys.modules.items() if name.startswith("complexity_deep.kernels.")]:
        for kernel in [value for value in vars(module).values() if isinstance(value, kernel_launch.Kernel)]:
            monkeypatch.setattr(kernel, "is_interpreted", False)
            monkeypatch.setattr(kernel, "jit", SimpleNamespace(device_caches=defaultdict(list)))
    monkeypatch.setattr(kernel_launch, "ThreadPoolExecutor", lambda workers: Pool(Pool()))
    monkeypatch.setattr(kernel_launch, "_current_device", lambda: 0)
    monkeypatch.setattr(kernel_launch, "_cuda_properties", lambda device: (132, 9))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(triton.runtime.cache, "triton_key", lambda: names.append("the hash of Triton"))
    return names


def compile_for(counts, rows=0, trains=False, **options) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "dynamics_controller_hidden": 64}
    arguments = counts, rows, torch.bfloat16, torch.bfloat16, torch.device("cuda", 0)
    compile_layer_kernels(tiny_config(**sizes | options), *arguments, trains=trains, experts=True)


def test_a_training_step_has_its_kernels_and_no_more(compiled):
    compile_for([2048], trains=True)
    assert compiled.pop(0) == "the hash of Triton"  # before the threads begin, each of which would compute it
    counts = Counter(compiled)
    assert counts["gate_up_bwd_kernel"] == counts["weight_grad_bwd_kernel"] == counts["gate_up_fwd_kernel"] == 1
    assert counts["inl_dynamics_bwd_kernel"] == 3  # first, inner and last layer
    assert not any("decode" in name for name in counts)
    one, both = len(compiled), token_classes(4)
    compiled.clear()
    compile_for(both, trains=True)
    assert one + 1 < len(compiled) < one * len(both)  # what does not depend on the number of tokens is compiled once


def test_generation_has_the_kernels_of_the_prompt_and_of_a_step(compiled):
    compile_for([33], rows=1)
    assert {"decode_qkv_kernel", "decode_down_kernel", "decode_attention_kernel", "join_parts_kernel"} <= {*compiled}
    compiled.clear()
    compile_for([33], rows=8)
    assert "decode_attention_kernel" in compiled and "decode_qkv_kernel" not in compiled
    for options in ({"use_mu_routing": False}, {"use_qk_norm": False}, {"use_dynamics": False}):
        compile_for([33, 2048], rows=2, **options)
    compiled.clear()
    plain = {"use_dynamics": False, "use_mu_guidance": False, "use_mu_routing": False, "num_experts": 64}
    compile_for([33], rows=1, **plain, shared_expert_intermediate_size=32, value_embedding_layers=[1])
    assert {"decode_value_kernel", "decode_linear_kernel", "decode_down_kernel"} <= {*compiled}
    assert "decode_update_kernel" not in compiled
    # Without guidance the queries, keys and values of all layers come from one kernel.
    assert compiled.count("decode_qkv_kernel") == compiled.count("decode_value_kernel") == 1


def test_kernels_compiled_by_threads_have_their_own_launchers(monkeypatch):
    """Triton 3.6 loads all launchers as modules of one name, and loading one again changes the one loaded last."""
    module = SimpleNamespace()

    class Launcher:
        def __init__(self, name, metadata):
            module.launch = name
            time.sleep(0.01)  # for other threads to load theirs
            self.launch = module.launch

    class Compiled:
        def __init__(self, name):
            self.src, self.metadata, self.run = name, None, None

        def __getitem__(self, grid):
            self.run = self.run or Launcher(self.src, self.metadata)

    def sums(x, y):
        pass

    made = {name: Compiled(name) for name in range(8)}
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(launcher_cls=Launcher)))
    monkeypatch.setattr(kernel_launch, "_current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with kernel_launch.compiling_ahead():
        for name in made:
            kernel = kernel_launch.Kernel(sums, ())
            kernel.is_interpreted, warmup = False, lambda *_, name=name, **__: made[name]
            kernel.jit = SimpleNamespace(device_caches=defaultdict(list), warmup=warmup)
            kernel.launch((1,), 1, 2)
    assert [kernel.run.launch for kernel in made.values()] == list(made)


def test_a_kernel_is_looked_up_once_for_all_values_of_a_float(monkeypatch):
    """Triton compiles for none of them. With an entry for each, a step size on a schedule would fill memory."""
    looked_up, launched = [], []

    def function(x, y, z):  # its source is read, which must begin with "def"
        pass

    found = SimpleNamespace(run=lambda *args: launched.append(args[-3:]), function=None, packed_metadata=None)
    monkeypatch.setattr(kernel_launch, "_current_device", lambda: 0)
    monkeypatch.setattr(kernel_launch, "_current_stream", lambda device: 0)
    kernel = kernel_launch.Kernel(function, ())
    kernel.is_interpreted, kernel.jit = False, defaultdict(lambda: lambda *args: looked_up.append(args) or found)
    for y in (0.5, 0.25, 1.0):
        kernel.launch((1,), torch.ones(4), y, 16)
    assert len(looked_up) == len(kernel.compiled) == 1
    assert [args[1:] for args in launched] == [(0.25, 16), (1.0, 16)]


def test_another_length_compiles_the_rest_once(monkeypatch):
    """The first call compiles for itself, the first that takes other kernels for all; then nothing is compiled."""
    asked = []
    ask = lambda config, counts, rows, *_, **__: asked.append((counts, rows))  # noqa: E731
    monkeypatch.setattr(accelerated, "compile_layer_kernels", ask)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(accelerated, "TRITON_DEVICES", ("cuda",))
    layer, counts = tiny_model().model.layers[0], token_classes(4)

    def call(rows, length):
        states = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(rows, length, 64))
        accelerated._compile_ahead(layer, states)
        return len(asked)

    with torch.enable_grad():
        assert [call(4, 300), call(4, 301), call(1, 1200)] == [1, 1, 1]
        assert asked[0] == ([1028], 0)
        assert call(4, 100) == 2 and asked[1] == ([count for count in counts if count != 1028], 0)
        assert [call(rows, length) for rows, length in itertools.product((1, 4, 64), (64, 600, 1023))] == [2] * 9
    with torch.no_grad():
        assert call(2, 50) == 3 and asked[2] == ([68], 2)
        assert [call(2, 1), call(2, 60)] == [3, 3]  # a step of the same rows
        assert call(1, 700) == 4 and asked[3] == ([512], 1)
        with FlopCounterMode(display=False):
            assert call(3, 700) == 4  # a mode would count what is computed for compiling
        assert call(3, 5) == 5 and asked[4] == ([16], 3)
