"""Ids, template, losslessness and errors of the tokenizer that the script writes."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from complexity_deep.scripts import train_tokenizer
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.text_sources import embedded_documents, load_sources, read_documents
from complexity_deep.workflow.data.tokenizer_training import SPECIAL_TOKENS, fertility, save_whole, train_bpe
from support import outcome_of

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "It is 42."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Any time."},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Thirty text files, one document each."""
    folder = tmp_path_factory.mktemp("corpus")
    for index, text in enumerate(islice(embedded_documents(), 30)):
        (folder / f"{index:02}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("written") / "tokenizer"
    options = ["--sources", corpus / "*.txt", "--vocab-size", 600, "--held-out-fraction", 0.2, "--output-dir", folder]
    status, output, errors = outcome_of("train_tokenizer", *options)
    assert status == 0, errors
    return folder, output


@pytest.fixture(scope="module")
def tokenizer(written):
    return AutoTokenizer.from_pretrained(written[0])


def test_ids_are_the_published_ones(tokenizer):
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 1)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|begin|>", 2)
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(16))
    assert len(tokenizer) == 600 and tokenizer.model_max_length == 2048
    assert tokenizer("a b")["input_ids"] and set(tokenizer("a b")) == {"input_ids", "attention_mask"}


def test_folder_holds_a_standard_tokenizer_and_nothing_unfinished(written):
    folder, output = written
    assert {path.name for path in folder.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["tokenizer"]
    assert "tokens per word" in output.splitlines()[-1] and "bytes per token" in output.splitlines()[-1]


@pytest.mark.parametrize("text", ["Hello  world\n\n\tdef f(x):\r\n", "naïve 文字 🙂 \x00 2026", " leading", ""])
def test_every_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_single_tokens(tokenizer):
    assert len(tokenizer("20261122")["input_ids"]) == 8


def test_chat_template_marks_exactly_what_the_assistant_says(tokenizer):
    encoded = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"]) if mask]
    assert tokenizer.decode(said) == "It is 42.<|im_end|>Any time.<|im_end|>"
    assert tokenizer.decode(encoded["input_ids"]) == "".join(
        f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in CHAT
    )
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert encoded["input_ids"].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == len(CHAT)


def test_saving_over_a_tokenizer_replaces_it_whole(tmp_path):
    texts = list(islice(embedded_documents(), 10))
    for size in (300, 280):
        save_whole(train_bpe(iter(texts), size, 128), tmp_path / "tokenizer")
        assert len(AutoTokenizer.from_pretrained(tmp_path / "tokenizer")) == size
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_fertility_counts_words_and_bytes(tokenizer):
    text = "the naïve function"
    tokens = len(tokenizer(text)["input_ids"])
    assert fertility(tokenizer, iter([text])) == {"tokens_per_word": tokens / 3, "bytes_per_token": 19 / tokens}


def test_embedded_corpus_is_english_and_always_the_same():
    documents = list(embedded_documents())
    assert documents == list(embedded_documents())
    assert len(documents) == len(set(documents)) > 300
    assert sum(map(len, documents)) > 1_500_000


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("empty.txt", b"", "is empty."),
        ("latin.txt", b"caf\xe9", "is not UTF-8 text"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', "is not UTF-8 text"),
        ("column.jsonl", b'{"body": "a"}\n', "has no column 'text'; its columns are: body."),
        ("number.jsonl", b'{"text": 3}\n', "does not hold text."),
        ("broken.jsonl", b"{", "cannot be read"),
        ("broken.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_unusable_files_are_named_in_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name) as error:
        load_sources([str(tmp_path / name)])
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_unusable_requests(tmp_path):
    for sources, sentence in [
        ([], "No text source"),
        (["word"], "Unknown source 'word'"),
        (["x*.txt"], "No file"),
    ]:
        with pytest.raises(InputError, match=sentence):
            load_sources(sources)
    (tmp_path / "one.txt").write_text("One document.")
    with pytest.raises(InputError, match="as many positive weights"):
        load_sources([str(tmp_path / "one.txt")], [0.5, 0.5])
    status, _, errors = outcome_of("train_tokenizer", "--vocab-size", 100, "--output-dir", tmp_path / "small")
    assert status == 2 and "--vocab-size 100 is too small" in errors.splitlines()[-1]


@pytest.fixture
def no_training(monkeypatch):
    """The output is looked at before any text is read."""
    monkeypatch.setattr(train_tokenizer, "load_sources", lambda *options: pytest.fail("the work began"))


def options(output: Path, **changed) -> SimpleNamespace:
    chosen = {"output_dir": str(output), "sources": ["embedded"], "source_weights": None, "text_column": "text"}
    return SimpleNamespace(**chosen, held_out_fraction=0.1, vocab_size=300, **changed)


@pytest.mark.parametrize(
    "place, sentence",
    [
        ("file", "'{0}/file' is a file"),
        ("file/tokenizer", "'{0}/file' is a file"),
        ("model", "holds 'model.safetensors', which would be lost"),
        ("/proc/tokenizer", "--output-dir '/proc/tokenizer' cannot be written"),
    ],
)
def test_the_output_folder_is_checked_first(tmp_path, no_training, place, sentence):
    (tmp_path / "file").touch()
    (tmp_path / "model").mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / "model" / name).touch()
    with pytest.raises(InputError) as refused:
        train_tokenizer.main(options(tmp_path / place))
    assert sentence.format(tmp_path) in str(refused.value) and "\n" not in str(refused.value)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.safetensors", "tokenizer.json"]


def test_a_split_without_one_side_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "train_bpe", lambda *options: pytest.fail("the work began"))
    (tmp_path / "one.jsonl").write_text('{"text": "one"}\n')
    one = {**vars(options(tmp_path / "out")), "sources": [str(tmp_path / "one.jsonl")]}
    for fraction, sentence in ((1e-9, "held out to measure"), (1 - 1e-9, "left to train on"), (0, "between 0 and 1")):
        with pytest.raises(InputError, match=sentence):
            train_tokenizer.main(SimpleNamespace(**{**one, "held_out_fraction": fraction}))


def test_errors_of_the_command_line_come_without_the_usage(tmp_path):
    status, _, errors = outcome_of("train_tokenizer", "--vocab-size", "many")
    assert status == 2 and len(errors.splitlines()) == 1
    assert errors.startswith("train_tokenizer.py: error: argument --vocab-size")
    for option in ("--max-characters", "--held-out-characters", "--model-max-length"):
        status, _, errors = outcome_of("train_tokenizer", option, "0", "--output-dir", tmp_path / "x")
        assert status == 2 and len(errors.splitlines()) == 1 and option in errors
    (tmp_path / "null.jsonl").write_text('{"text": null}\n')
    status, _, errors = outcome_of(
        "train_tokenizer", "--sources", tmp_path / "null.jsonl", "--output-dir", tmp_path / "x"
    )
    assert status == 1 and len(errors.splitlines()) == 1 and "holds no text" in errors


def test_file_that_turns_out_bad_later_is_reported(tmp_path):
    path = tmp_path / "late.jsonl"
    path.write_bytes(b'{"text": "good"}\n' * 50_000 + b'{"text": "caf\xe9"}\n' + b'{"text": "good"}\n' * 2_000_000)
    with pytest.raises(InputError, match="UTF-8"):
        list(read_documents(load_sources([str(path)])))


@pytest.mark.parametrize(
    "late, sentence",
    [
        (b'{"text": "b", "note": 1}', "some of its rows have other columns than the first"),
        (b"{", "cannot be read to its end: ArrowInvalid"),
    ],
)
def test_a_later_file_that_is_unlike_the_first_is_one_sentence(tmp_path, late, sentence):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_bytes(late)
    with pytest.raises(InputError, match=sentence) as error:
        list(read_documents(load_sources([f"{tmp_path}/*.jsonl"])))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rows, sentence", [(0, "is empty."), (None, "cannot be read: ")])
def test_a_later_parquet_file_without_rows_is_named_before_work_begins(tmp_path, rows, sentence):
    table = pyarrow.table({"text": ["a"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "b.parquet")
    if rows is None:
        (tmp_path / "b.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(InputError, match=f"b.parquet' {sentence}"):
        load_sources([f"{tmp_path}/*.parquet"])


def test_no_file_is_left_out_for_its_name(tmp_path):
    names = ["a.jsonl", "b [1].jsonl", "c*.jsonl", ".d/__e__/f.jsonl"]
    (tmp_path / ".d" / "__e__").mkdir(parents=True)
    for name in names:
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n')
    assert list(read_documents(load_sources([f"{tmp_path}/*.jsonl"]))) == names[:3]
    for name in names:
        assert list(read_documents(load_sources([f"{tmp_path}/{name}"]))) == [name]


def test_mixture_follows_the_weights_and_loses_nothing(tmp_path):
    for name, count in (("a", 200), ("b", 30)):
        lines = [f'{{"text": "{name}{index}"}}' for index in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    documents = list(read_documents(load_sources([f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"], [0.8, 0.2])))
    share = sum(text.startswith("b") for text in documents) / len(documents)
    assert 0.12 < share < 0.28 and len(set(documents)) == 230
    table = pyarrow.table({"text": pyarrow.array(["c"], pyarrow.large_string()), "id": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    kinds = ["embedded", f"{tmp_path}/b.jsonl", f"{tmp_path}/c.parquet"]
    assert list(read_documents(load_sources(kinds)))[-2:] == ["b29", "c"]
    one_after_the_other = list(read_documents(load_sources([f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"])))
    assert len(one_after_the_other) == 230 and one_after_the_other[-1] == "b29"
