"""The chunked loss beside the plain head: values, gradients, precision and memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

import complexity_deep  # noqa: F401  (registers the architecture)
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.training import chunked_loss
from complexity_deep.workflow.training.chunked_loss import use_chunked_loss

VOCABULARY = 500


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """128 tokens a chunk, so that a batch of 300 takes three and the last one is not full."""
    monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", 128 * VOCABULARY)


def new_model(model_type: str, **options):
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}
    shape.update(vocab_size=VOCABULARY, intermediate_size=64, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**shape, **options})).train()


def batch(rows: int = 3, tokens: int = 100) -> dict:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    labels = ids.masked_fill(torch.rand(rows, tokens, generator=generator) < 0.1, -100)
    return {"input_ids": ids, "labels": labels, "use_cache": False}


def loss_and_gradients(model, inputs: dict, run=None) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    loss = (model if run is None else run)(**inputs).loss
    (3 * loss).backward()  # an upstream gradient other than 1
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(measured: tuple, expected: tuple, tolerance: float) -> None:
    torch.testing.assert_close(measured[0], expected[0], rtol=tolerance, atol=0.0)
    assert measured[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        error = (measured[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", ["complexity-deep", "llama"])
def test_loss_and_gradients_are_those_of_the_plain_head(model_type, tied):
    model, chunked = (new_model(model_type, tie_word_embeddings=tied) for _ in range(2))
    use_chunked_loss(chunked)
    for items in ({}, {"num_items_in_batch": torch.tensor(777)}):  # as in gradient accumulation
        inputs = {**batch(), **items}
        # The order of sums in fp32 depends on the processor: 1.03e-6 was seen on an AMD one.
        assert_same(loss_and_gradients(chunked, inputs), loss_and_gradients(model, inputs), 5e-6)


@pytest.mark.parametrize("model_type", ["complexity-deep", "llama"])
def test_compiled_in_one_graph(model_type):
    model, chunked = (new_model(model_type, num_hidden_layers=1) for _ in range(2))
    use_chunked_loss(chunked)
    inputs = {**batch(), "num_items_in_batch": torch.tensor(777)}
    compiled = loss_and_gradients(chunked, inputs, torch.compile(chunked, backend="aot_eager", fullgraph=True))
    assert_same(compiled, loss_and_gradients(model, inputs), 5e-6)  # the layers below round otherwise too


def test_bf16_autocast_is_as_exact_as_the_plain_head():
    """Against fp32, the error of the chunked head is at most that of the plain one."""
    model, chunked = new_model("llama"), new_model("llama")
    use_chunked_loss(chunked)
    exact = loss_and_gradients(model, batch())
    with torch.autocast("cpu", torch.bfloat16):
        plain, measured = loss_and_gradients(model, batch()), loss_and_gradients(chunked, batch())
    name = "lm_head.weight"
    errors = [(run[1][name] - exact[1][name]).norm() / exact[1][name].norm() for run in (plain, measured)]
    assert errors[1] < 1.1 * errors[0], errors
    assert abs(measured[0] - exact[0]) < max(1.1 * abs(plain[0] - exact[0]), 1e-3)


def test_z_loss_is_in_the_training_loss_only():
    model = new_model("llama")
    inputs = batch()
    outputs = model(**inputs)
    log_sum = outputs.logits[:, :-1].logsumexp(dim=-1)[inputs["labels"][:, 1:] != -100]
    model.zero_grad()
    (outputs.loss + 0.01 * log_sum.square().mean()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    use_chunked_loss(model, z_loss=0.01)
    loss, gradients = loss_and_gradients(model, inputs)
    gradients = {name: gradient / 3 for name, gradient in gradients.items()}
    assert_same((loss, gradients), ((outputs.loss + 0.01 * log_sum.square().mean()).detach(), expected), 1e-5)
    torch.testing.assert_close(model.eval()(**inputs).loss, outputs.loss)


def test_without_labels_the_model_is_as_before():
    model = new_model("complexity-deep").eval()
    ids = batch()["input_ids"]
    expected = model(ids).logits
    generated = model.generate(ids[:1, :5], max_new_tokens=4, do_sample=False)
    use_chunked_loss(model)
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.generate(ids[:1, :5], max_new_tokens=4, do_sample=False), generated)


def test_token_losses():
    model = new_model("complexity-deep").eval()
    inputs = batch()
    logits = model(**inputs).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), inputs["labels"][:, 1:], reduction="none")
    use_chunked_loss(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).token_losses, expected, rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that an operation's result has, views of existing memory aside."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        result = function(*arguments, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_no_tensor_has_tokens_times_vocabulary(autocast):
    def largest(model, rows: int) -> int:
        with LargestTensor() as mode, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(**batch(rows, tokens=128)).loss.backward()
        return mode.elements

    model = new_model("llama")
    assert largest(model, rows=3) == 3 * 128 * VOCABULARY, "the plain head has one"
    use_chunked_loss(model)
    assert largest(model, rows=3) == largest(model, rows=6) == 128 * VOCABULARY, "one chunk, whatever the batch"


@pytest.mark.parametrize("model_type, options", [("cohere", {}), ("phi", {}), ("gemma2", {"head_dim": 16})])
def test_heads_that_are_more_than_a_product_are_refused(model_type, options):
    with pytest.raises(InputError, match="set chunked_loss to false"):
        use_chunked_loss(new_model(model_type, pad_token_id=0, **options))
