"""Text of tokens that come one by one."""

import random
from itertools import islice

import pytest

from complexity_deep.workflow.data.text_sources import embedded_documents
from complexity_deep.workflow.data.tokenizer_training import train_bpe
from complexity_deep.workflow.serving.answer_text import AnswerText, TokenTexts
from support import tiny_tokenizer

TEXT = "naïve café, 日本語 🙂🙂 and\n\n  spaces, then more"


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes and few merges, so that many characters are several tokens."""
    return train_bpe((text[:500] for text in islice(embedded_documents(), 20)), vocab_size=300, model_max_length=64)


def test_texts_of_tokens_together_are_the_text_of_all(tokenizer):
    tokens = tokenizer(TEXT)["input_ids"]
    texts = TokenTexts(tokenizer)
    pieces = [texts.text_of(token) for token in tokens]
    assert "".join(pieces) + texts.rest() == TEXT
    assert "" in pieces and "\ufffd" not in "".join(pieces) and "🙂" in pieces


def test_a_character_after_bytes_that_are_none_is_whole(tokenizer):
    """Such bytes are written as U+FFFD, which a text may have too, and are given up without what follows them."""
    broken = tokenizer("日")["input_ids"][1]
    for before in ([broken] * n for n in range(20)):
        for text in "🙂", "\ufffd🙂", "\ufffd\ufffd\ufffd日本 é":
            tokens = before + tokenizer(text)["input_ids"]
            texts = TokenTexts(tokenizer)
            pieces = [texts.text_of(token) for token in tokens] + [texts.rest()]
            assert "".join(pieces) == tokenizer.decode(tokens) == "\ufffd" * len(before) + text


def test_tokens_without_a_text_do_not_move_those_beside_them():
    """Special tokens are left out of a text, and the space between words depends on the word before."""
    tokenizer = tiny_tokenizer()
    for seed in range(50):
        tokens = random.Random(seed).choices([0, 1, 3, 50, 51], k=12)
        texts = TokenTexts(tokenizer)
        pieces = [texts.text_of(token) for token in tokens]
        assert "".join(pieces) + texts.rest() == tokenizer.decode(tokens, skip_special_tokens=True)


def test_an_unfinished_character_is_told_at_the_end_and_noise_is_not_held_back(tokenizer):
    tokens = tokenizer("日")["input_ids"]
    assert len(tokens) == 3
    texts = TokenTexts(tokenizer)
    assert [texts.text_of(token) for token in tokens[:2]] == ["", ""] and texts.rest() == "\ufffd"
    texts = TokenTexts(tokenizer)
    assert any(texts.text_of(tokens[1]) for _ in range(20))


@pytest.mark.parametrize(
    ("stop", "end"),
    [
        ([], None),
        (["日本"], "日本"),
        (["🙂🙂 a", "\n"], "🙂🙂 a"),
        (["and\n\n  spaces, now", "more"], "more"),
        (["more and more"], None),
        (["n"], "n"),
        (["and\n\n  s"], "and\n\n  s"),
        (["ve c", "e c"], "ve c"),
    ],
)
def test_text_ends_before_the_first_stop_string(tokenizer, stop, end):
    tokens = tokenizer(TEXT)["input_ids"]
    answer = AnswerText(tokenizer, stop)
    text = ""
    for token in tokens:
        text += answer.add([token])
        assert TEXT.startswith(text)
    text += answer.end()
    expected = TEXT if end is None else TEXT[: TEXT.index(end)]
    assert text == expected and answer.is_stopped == (end is not None)
    assert answer.num_tokens <= len(tokens) and (end is not None or answer.num_tokens == len(tokens))
    at_once = AnswerText(tokenizer, stop)
    assert at_once.add(tokens) + at_once.end() == expected
