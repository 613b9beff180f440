"""Forward and backward of a training step as one CUDA graph.

A small model's step is hundreds of short kernels, and the host takes longer to launch them than the GPU to run them.
Recorded once and replayed, they follow each other at the GPU's own pace. Clipping and the optimizer stay outside.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

LOSS_TOLERANCE = 1e-3  # relative; bf16 sums may differ in their order
NORM_TOLERANCE = 2e-2  # of the gradients; those of embeddings are summed by atomic operations


class RecordedStep:
    """Call it like `step`, which takes tensors by name and returns the loss after a backward pass.

    The first `warm_up` calls run as they are, so that everything is compiled. The next one is recorded and its replay
    compared with the step itself; a replay that gives another loss or gradient is an error. What cannot be recorded
    raises what CUDA says.
    """

    def __init__(self, step: Callable[..., Tensor], model: nn.Module, warm_up: int = 3):
        self.step, self.parameters = step, list(model.parameters())
        self.calls_left, self.graph = warm_up, None

    def __call__(self, **inputs: Tensor) -> Tensor:
        if self.graph is None:
            if self.calls_left:
                self.calls_left -= 1
                return self.step(**inputs)
            self._record(inputs)
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self._replay()
        return self.loss.clone()

    def _replay(self) -> None:
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad = gradient  # the optimizer's zero_grad has taken it away
        self.graph.replay()

    def _record(self, inputs: dict[str, Tensor]) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss, norm = self.step(**self.inputs).clone(), self._gradient_norm()
        torch.cuda.current_stream().wait_stream(stream)
        for parameter in self.parameters:
            parameter.grad = None  # so that the recorded backward writes gradients and does not add to them
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss = self.step(**self.inputs)
        self.gradients = [parameter.grad for parameter in self.parameters]
        self.graph = graph
        self._replay()
        self._compare("loss", self.loss, loss, LOSS_TOLERANCE)
        self._compare("gradient norm", self._gradient_norm(), norm, NORM_TOLERANCE)

    def _gradient_norm(self) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    @staticmethod
    def _compare(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
        if not (found - expected).abs() <= tolerance * expected.abs():
            raise RuntimeError(f"The recorded step has a {what} of {found.item()}, the step itself {expected.item()}.")
