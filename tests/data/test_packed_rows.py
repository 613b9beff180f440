"""Packing, the stream that stops and goes on at any row, its shares and its loader, on text of the standard library."""

import copy
import json
from itertools import islice

import datasets
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.packed_rows import (
    PackedCollator,
    PackedDocuments,
    ResumableLoader,
    held_out_rows,
    tokenize,
)
from complexity_deep.workflow.data.text_sources import is_held_out, load_sources, read_documents
from pretraining import ROW, documents_in, small_texts, small_tokenizer, write_corpus


@pytest.fixture(scope="module")
def texts():
    return small_texts()


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("corpus") / "text"
    write_corpus(folder, texts)
    return folder


def packed(stream, tokenizer, **options) -> PackedDocuments:
    options = {"shuffle_buffer": 7, "seed": 0, "held_out_fraction": 0.0, **options}
    return PackedDocuments(stream, tokenizer, ROW, **options)


def rows_of_one_pass(dataset: PackedDocuments) -> list[dict]:
    """Rows up to and including the one in which the second pass begins."""
    rows = []
    for row in dataset:
        rows.append(row)
        if row["cursor"]["epoch"] == 1:
            return rows


def test_packing_loses_no_token_and_positions_restart(corpus, texts, tokenizer):
    dataset = packed(load_sources([f"{corpus}/*.jsonl"]), tokenizer)
    rows = rows_of_one_pass(dataset)
    first_pass = documents_in(rows, tokenizer.eos_token_id)[: len(texts)]
    assert sorted(first_pass) == sorted(tuple(ids) for ids in tokenize(tokenizer, texts))
    assert first_pass != [tuple(ids) for ids in tokenize(tokenizer, texts)], "documents are shuffled"
    for row in rows:
        assert len(row["input_ids"]) == ROW
        expected, position = [], 0
        for token in row["input_ids"]:
            expected.append(position)
            position = 0 if token == tokenizer.eos_token_id else position + 1
        assert row["position_ids"] == expected


def test_text_that_looks_like_a_special_token_is_text(tokenizer):
    ids = tokenize(tokenizer, ["a<|endoftext|>b<|im_start|>"])[0]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in ids


@pytest.mark.parametrize("template", ["<|begin|> $A", "<|begin|> $A <|endoftext|>", "$A"])
def test_documents_begin_as_prompts_do(tokenizer, template):
    plain, other = tokenize(tokenizer, ["a text"])[0], copy.deepcopy(tokenizer)
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|begin|>", "<|endoftext|>")]
    other.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    begin = [tokenizer.bos_token_id] if "begin" in template else []
    assert tokenize(other, ["a text"])[0] == begin + plain


@pytest.mark.parametrize("model_type", ["complexity-deep", "llama"])
def test_packed_row_trains_like_its_documents_apart(model_type, tokenizer):
    """Mean loss over a packed row = token-weighted mean over its documents, each alone."""
    import complexity_deep  # noqa: F401  (registers the architecture)

    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(model_type, vocab_size=300, hidden_size=32, intermediate_size=64, **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    documents = [torch.randint(16, 300, (length,)).tolist() for length in (20, 3, 25)]
    row = {
        "input_ids": [token for document in documents for token in document],
        "position_ids": [position for document in documents for position in range(len(document))],
    }
    together = model(**PackedCollator(mask_across_documents=True)([row])).loss
    losses = []
    for document in documents:
        alone = torch.tensor([document])
        losses.append(model(input_ids=alone, labels=alone).loss * (len(document) - 1))
    torch.testing.assert_close(together, sum(losses) / sum(len(d) - 1 for d in documents), atol=1e-5, rtol=1e-5)
    concatenated = model(**PackedCollator(mask_across_documents=False)([row])).loss
    assert abs(concatenated - together) > 1e-4
    for mask_across_documents in (True, False):
        batch = PackedCollator(mask_across_documents)([row, row])
        # Memory in which two elements lie in one place cannot be pinned.
        assert all(x.is_contiguous() for x in batch.values() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize(
    "files, weights", [(["*"], None), (["0", "[12]"], None), (["0", "[12]"], [0.3, 0.7])], ids=["one", "two", "mixture"]
)
def test_resumed_stream_continues_at_the_next_row(corpus, tokenizer, files, weights):
    """Stopped after any row, also in the second pass, a new stream with the saved cursors gives what follows."""
    sources = [f"{corpus}/{name}.jsonl" for name in files]
    whole = list(islice(packed(load_sources(sources, weights), tokenizer), 700))
    assert whole[-1]["cursor"]["epoch"] >= 1
    for stop in (1, 2, 37, 311, 600):
        resumed = packed(load_sources(sources, weights), tokenizer)
        resumed.cursors = json.loads(json.dumps([whole[stop - 1]["cursor"]]))
        for row, expected in zip(islice(resumed, 40), whole[stop : stop + 40], strict=True):
            assert row == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_state_follows_the_batches_handed_out(corpus, tokenizer, workers):
    def loader(cursors=None):
        dataset = packed(load_sources([f"{corpus}/*.jsonl"]), tokenizer, workers=max(1, workers))
        if cursors:
            dataset.cursors = cursors
        return ResumableLoader(dataset, batch_size=3, collate_fn=PackedCollator(True), num_workers=workers)

    whole = [batch["input_ids"] for batch in islice(loader(), 17)]
    first = loader()
    for _ in islice(first, 7):  # an odd number, so that the workers' turns are interrupted in the middle
        pass
    cursors = json.loads(json.dumps(first.dataset.cursors))
    rest = [batch["input_ids"] for batch in islice(loader(cursors), 10)]
    assert all(torch.equal(batch, expected) for batch, expected in zip(rest, whole[7:], strict=True))


def test_loader_puts_batches_where_they_are_used(corpus, tokenizer):
    """Else Trainer counts the labels on the host and waits for the device, at every step, to hand it the count."""
    dataset = packed(load_sources([f"{corpus}/*.jsonl"]), tokenizer)
    batch = next(iter(ResumableLoader(dataset, batch_size=3, collate_fn=PackedCollator(True), device="meta")))
    assert {x.device.type for x in batch.values() if isinstance(x, torch.Tensor)} == {"meta"}
    assert batch["use_cache"] is False and "cursor" not in batch


def test_workers_do_not_wait_for_tokenizer_threads_of_the_process_they_were_forked_from(
    corpus, texts, tokenizer, monkeypatch
):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # as people do who were warned about it
    tokenize(tokenizer, texts)  # starts the threads
    dataset = packed(load_sources([f"{corpus}/*.jsonl"]), tokenizer)
    loader = ResumableLoader(dataset, batch_size=2, collate_fn=PackedCollator(True), num_workers=1, timeout=120)
    assert next(iter(loader))["input_ids"].shape == (2, ROW)


@pytest.mark.parametrize("world_size, workers", [(2, 1), (2, 2), (3, 1)])  # 3 files: shared by document, or by file
def test_ranks_and_workers_read_disjoint_shares_that_cover_everything(corpus, texts, tokenizer, world_size, workers):
    seen = []
    for rank in range(world_size):
        dataset = packed(
            load_sources([f"{corpus}/*.jsonl"]), tokenizer, rank=rank, world_size=world_size, workers=workers
        )
        for cursor in dataset.cursors:
            share = [ids for place, ids in iter_first_pass(dataset, cursor)]
            assert share
            seen += [tuple(ids) for ids in share]
    assert sorted(seen) == sorted(tuple(ids) for ids in tokenize(tokenizer, texts))


def iter_first_pass(dataset: PackedDocuments, cursor: dict):
    for place, ids in dataset._documents(cursor):
        if place["epoch"] > 0:
            return
        yield place, ids


def test_held_out_documents_are_disjoint_from_training(corpus, texts, tokenizer):
    stream = load_sources([f"{corpus}/*.jsonl"])
    kept_out = [text for text in texts if is_held_out(text, 0.3)]
    assert 5 < len(kept_out) < 35
    training = packed(stream, tokenizer, held_out_fraction=0.3)
    trained_on = {tuple(ids) for _, ids in iter_first_pass(training, training.cursors[0])}
    assert trained_on == {tuple(ids) for ids in tokenize(tokenizer, [t for t in texts if t not in kept_out])}
    validation = held_out_rows(stream, tokenizer, ROW, rows=5, fraction=0.3)
    assert len(validation) == 5
    in_order = [ids for text in read_documents(stream) if text in kept_out for ids in tokenize(tokenizer, [text])[0]]
    assert [token for row in validation["input_ids"] for token in row] == in_order[: 5 * ROW]


def test_document_longer_than_the_shuffle_buffer(tmp_path, tokenizer):
    """The buffer counts documents, so one of any length goes through it whole."""
    long = " ".join(["a long document"] * 500)
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (long, "short", long)))
    dataset = packed(load_sources([str(path)]), tokenizer, shuffle_buffer=1)
    documents = documents_in(rows_of_one_pass(dataset), tokenizer.eos_token_id)[:3]
    assert documents == [tuple(ids) for ids in tokenize(tokenizer, [long, "short", long])]


def test_no_documents(tmp_path, tokenizer):
    stream = datasets.Dataset.from_dict({"text": ["", "  \n"]}).to_iterable_dataset()
    with pytest.raises(InputError, match="found no document to train on"):
        next(iter(packed(stream, tokenizer)))
    with pytest.raises(InputError, match="do not fill one row"):
        held_out_rows(stream, tokenizer, ROW, rows=4, fraction=0.5)
