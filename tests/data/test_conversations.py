"""Conversations of many layouts: their tokens, what of them is learned, and which rows are refused."""

import json
import random
from pathlib import Path

import datasets
import pytest
import yaml

import complexity_deep  # noqa: F401  (registers the architecture)
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data import conversations as sources
from complexity_deep.workflow.data.conversations import ChatEncoder, load_conversations
from complexity_deep.workflow.data.sources import mix
from conversations import ACADEMIC, QUESTION, SCIQ, chat, chat_tokenizer, expected_tokens, write_jsonl
from support import REPOSITORY

pytestmark = pytest.mark.usefixtures("dataset_cache")


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


CONVERSATIONS = {
    "one turn": chat("What is 12 + 30?", "It is 42."),
    "several turns": chat("Hello", "Good morning.", "And now?", "Good night.", "Bye", "Bye"),
    "system message": chat("Hello", "Yes?", system="Be brief."),
    "user last": chat("Hello", "Yes?", "Thanks"),
    "white space at the edges": chat("  Hello\n\n", "\n\n  def f():\n    return 1\n\n\n", " ", "\tdone "),
    "bytes": chat("🙂 naïve?", "🙂🙃 Ünïcödé — 日本語", "日", "語"),
    "empty answer": chat("Say nothing.", ""),
    "looks like the template": chat("assistant\nuser\n", "user\nassistant\n"),
    "two answers in a row": [*chat("Hello", "One."), {"role": "assistant", "content": "Two."}],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_mask_is_what_the_assistant_says(tokenizer, name):
    encoded = ChatEncoder(tokenizer)({"messages": CONVERSATIONS[name]}, 0, "here", "chat")
    ids, mask = expected_tokens(tokenizer, CONVERSATIONS[name])
    assert (encoded["input_ids"], encoded["assistant_masks"]) == (ids, mask)
    said = [token for token, kept in zip(ids, mask) if kept]
    answers = [m["content"].strip() + "<|im_end|>" for m in CONVERSATIONS[name] if m["role"] == "assistant"]
    assert tokenizer.decode(said) == "".join(answers)


def test_mask_on_random_conversations(tokenizer):
    letters = random.Random(0)
    encoder = ChatEncoder(tokenizer)
    for _ in range(300):
        texts = ["".join(letters.choices("ab .,\n\t0é🙂日'", k=letters.randint(0, 12))) for _ in range(6)]
        messages = chat(*texts[: letters.choice((2, 4, 6))])
        encoded = encoder({"messages": messages}, 0, "here", "chat")
        assert (encoded["input_ids"], encoded["assistant_masks"]) == expected_tokens(tokenizer, messages)


def test_only_the_completion_is_learned(tokenizer):
    encoder = ChatEncoder(tokenizer)
    turns = chat("Hello", "Good morning.", "And now?", "Good night.")
    encoded = encoder({"prompt": turns[:3], "completion": turns[3:]}, 0, "here", "prompt and completion")
    assert (encoded["input_ids"], encoded["assistant_masks"]) == expected_tokens(tokenizer, turns, learned_from=3)
    encoded = encoder({"prompt": "Hello", "completion": "Yes?"}, 0, "here", "prompt and completion")
    assert (encoded["input_ids"], encoded["assistant_masks"]) == expected_tokens(tokenizer, chat("Hello", "Yes?"))


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city, in °C",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def call(identity: str, **arguments) -> dict:
    return {"id": identity, "type": "function", "function": {"name": "weather", "arguments": arguments}}


USE = [
    {"role": "user", "content": "Rome and Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [call("a", city="Rome"), call("b", city="Oslo", days=2)]},
    {"role": "tool", "tool_call_id": "a", "content": "22"},
    {"role": "tool", "tool_call_id": "b", "name": "weather", "content": "5"},
    {"role": "assistant", "content": "Once more.", "tool_calls": [call("c", place={"lat": 1, "far": None})]},
    {"role": "tool", "tool_call_id": "c", "content": "9"},
    {"role": "assistant", "reasoning_content": "Which one?", "content": "Rome."},
]
SAID = [
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call><|im_end|>',
    'Once more.\n<tool_call>\n{"name": "weather", "arguments": {"place": {"lat": 1, "far": null}}}\n</tool_call>'
    "<|im_end|>",
    "<think>\nWhich one?\n</think>\n\nRome.<|im_end|>",
]


def encode(tokenizer, source: Path) -> list[dict]:
    return load_conversations(str(source), ChatEncoder(tokenizer), 9999, False)[0].to_list()


def said(tokenizer, encoded: dict) -> str:
    return tokenizer.decode([token for token, kept in zip(encoded["input_ids"], encoded["assistant_masks"]) if kept])


@pytest.mark.parametrize("form", ["objects", "strings"])
def test_tool_use_is_rendered_and_learned(tokenizer, tmp_path, form):
    """Schemas, calls and results reach the model, as objects and as the strings that datasets of the Hub often have."""
    use, tools = json.loads(json.dumps(USE)), [TOOL]
    if form == "strings":
        tools = json.dumps(tools)
        for message in use:
            if "tool_calls" in message:
                message["tool_calls"] = json.dumps(message["tool_calls"])
    rows = [{"messages": use, "tools": tools}, {"messages": chat("Hello", "Yes?"), "tools": None}]
    encoded = encode(tokenizer, write_jsonl(tmp_path / "rows.jsonl", rows))
    text = tokenizer.decode(encoded[0]["input_ids"])
    assert said(tokenizer, encoded[0]) == "".join(SAID)
    assert (
        text.startswith("<|im_start|>system\n") and f"<tools>\n{json.dumps(TOOL, ensure_ascii=False)}\n</tools>" in text
    )
    for result in ("22", "5", "9"):
        assert f"<|im_start|>tool name=weather\n<tool_response>\n{result}\n</tool_response><|im_end|>\n" in text
    assert (encoded[1]["input_ids"], encoded[1]["assistant_masks"]) == expected_tokens(tokenizer, chat("Hello", "Yes?"))


def test_arrow_adds_no_arguments(tokenizer, tmp_path):
    """Arrow gives every struct of a column the keys of all, filled with nulls."""
    calls = [{"name": "weather", "arguments": arguments} for arguments in ({"city": "Rome"}, {"days": 2})]
    rows = [{"messages": [*chat("?"), {"role": "assistant", "content": "", "tool_calls": [c]}]} for c in calls]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    stored = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"))[0]["messages"][1]["tool_calls"][0]
    assert stored["arguments"] == {"city": "Rome", "days": None}
    encoded = encode(tokenizer, tmp_path / "rows.parquet")
    assert '"arguments": {"city": "Rome"}}' in said(tokenizer, encoded[0])
    assert '"arguments": {"days": 2}}' in said(tokenizer, encoded[1])


def test_tools_of_a_prompt_are_not_learned(tokenizer, tmp_path):
    rows = [{"prompt": USE[:4], "completion": USE[4:], "tools": [TOOL]}]
    (encoded,) = encode(tokenizer, write_jsonl(tmp_path / "rows.jsonl", rows))
    assert said(tokenizer, encoded) == "".join(SAID[1:])
    assert "</tools>" in tokenizer.decode(encoded["input_ids"]) and SAID[0] in tokenizer.decode(encoded["input_ids"])


# Today's template before it knew tools: conversations without them must come out the same.
PLAIN = """{%- for message in messages -%}
    {%- if message["role"] == "assistant" -%}
        {{- "<|im_start|>assistant\\n" -}}
        {%- generation -%}{{- message["content"] + "<|im_end|>" -}}{%- endgeneration -%}
        {{- "\\n" -}}
    {%- else -%}
        {{- "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}"""


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [False, True])
def test_conversations_without_tools_are_rendered_as_before(tokenizer, name, prompt):
    both = [
        tokenizer.apply_chat_template(
            CONVERSATIONS[name], chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        for template in (tokenizer.chat_template, PLAIN)
    ]
    assert both[0] == both[1]


def refusal(tokenizer, tmp_path, row: dict, template: str | None = None) -> str:
    other = type(tokenizer)(tokenizer_object=tokenizer._tokenizer)
    other.chat_template = template or tokenizer.chat_template
    with pytest.raises(InputError) as refused:
        encode(other, write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat("a", "b")}, row]))
    assert "\n" not in str(refused.value) and "object has no attribute" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content", "name", "tool_call_id", "mood"])
def test_keys_that_the_template_leaves_out_are_refused(tokenizer, tmp_path, key):
    value = [call("a", city="Rome")] if key == "tool_calls" else "a"
    messages = [*chat("Hello"), {"role": "assistant", "content": "Yes?", key: value}]
    assert f"does not render the {key} of its message 1" in refusal(tokenizer, tmp_path, {"messages": messages}, PLAIN)
    if key == "mood":  # ours does not know it either, and one that does is given it
        assert "does not render the mood" in refusal(tokenizer, tmp_path, {"messages": messages})
        tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer)
        mooded = '{{- message["content"] + (message.mood or "") + "<|im_end|>" -}}'
        tokenizer.chat_template = PLAIN.replace('{{- message["content"] + "<|im_end|>" -}}', mooded)
        (encoded,) = encode(tokenizer, write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}]))
        assert said(tokenizer, encoded) == "Yes?a<|im_end|>"


@pytest.mark.parametrize(
    "row, sentence",
    [
        ({"messages": chat("a", "b"), "tools": [TOOL]}, "the chat template does not render its tools"),
        ({"messages": chat("a", "b"), "documents": [{"text": "c"}]}, "does not render its documents"),
        ({"messages": chat("a", "b"), "chat_template_kwargs": {"mood": "good"}}, "does not render its mood"),
        ({"messages": chat("a", "b"), "tools": "{"}, "its tools is neither a list nor one written as JSON"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, "its message 1 has no content"),
    ],
)
def test_rows_that_cannot_be_rendered_whole(tokenizer, tmp_path, row, sentence):
    assert sentence in refusal(tokenizer, tmp_path, row, PLAIN)


def test_columns_about_a_conversation_are_no_part_of_it(tokenizer, tmp_path):
    """As HuggingFaceH4/ultrachat_200k has them."""
    row = {"prompt": "Hello", "prompt_id": "f00", "messages": chat("Hello", "Yes?"), "score": 0.5}
    (encoded,) = encode(tokenizer, write_jsonl(tmp_path / "rows.jsonl", [row]))
    assert (encoded["input_ids"], encoded["assistant_masks"]) == expected_tokens(tokenizer, chat("Hello", "Yes?"))


ASKED = {"instruction": "Name it.", "output": "Oak."}


@pytest.mark.parametrize(
    "row, turns",
    [
        ({**ASKED, "input": "A tree.", "system": "Be brief."}, chat("Name it.\n\nA tree.", "Oak.", system="Be brief.")),
        ({**ASKED, "history": [["Hi", "Yes?"]]}, chat("Hi", "Yes?", "Name it.", "Oak.")),
        ({**ASKED, "context": "A tree."}, chat("Name it.\n\nA tree.", "Oak.")),
        (
            {"instruction": "Name it.", "input": "A tree.", "response": "Oak."},
            chat("Name it.\n\nA tree.", "Oak."),
        ),
        ({"prompt": "Hi", "completion": "Yes?", "system_prompt": "Be brief."}, chat("Hi", "Yes?", system="Be brief.")),
        ({"messages": chat("Hi", "Yes?"), "system": "Be brief."}, chat("Hi", "Yes?", system="Be brief.")),
        (
            {"messages": chat("Hi", "Yes?", system="Be brief."), "system": "Be brief."},
            chat("Hi", "Yes?", system="Be brief."),
        ),
        ({"messages": chat("Hi", "Yes?"), "system": None}, chat("Hi", "Yes?")),
    ],
)
def test_no_column_of_a_conversation_is_left_out(tokenizer, tmp_path, row, turns):
    (encoded,) = encode(tokenizer, write_jsonl(tmp_path / "rows.jsonl", [row]))
    assert (encoded["input_ids"], encoded["assistant_masks"]) == expected_tokens(tokenizer, turns)


def test_a_system_message_of_a_prompt_is_not_learned(tokenizer, tmp_path):
    turns = chat("Hi", "Yes?", "And?", "No.")
    row = {"prompt": turns[:3], "completion": turns[3:], "system": "Be brief."}
    (encoded,) = encode(tokenizer, write_jsonl(tmp_path / "rows.jsonl", [row]))
    whole = [{"role": "system", "content": "Be brief."}, *turns]
    assert (encoded["input_ids"], encoded["assistant_masks"]) == expected_tokens(tokenizer, whole, learned_from=4)


@pytest.mark.parametrize(
    "row, sentence",
    [
        ({"messages": chat("Hi", "Yes?", system="Be long."), "system": "Be brief."}, "other than its system message"),
        ({"question": "?", "choices": ["a"] * 27, "answer": 26}, "it has 27 choices"),
    ],
)
def test_rows_that_would_lose_something_are_refused(tokenizer, tmp_path, row, sentence):
    with pytest.raises(InputError, match=sentence):
        encode(tokenizer, write_jsonl(tmp_path / "rows.jsonl", [row]))


@pytest.mark.parametrize("name", ACADEMIC)
def test_rows_of_the_hub_become_exchanges(tokenizer, tmp_path, name):
    row, question, answer = ACADEMIC[name]
    rows, record = load_conversations(
        str(write_jsonl(tmp_path / "rows.jsonl", [row])), ChatEncoder(tokenizer), 999, False
    )
    assert record["format"] == name
    assert rows[0]["messages"] == chat(question, answer)
    assert (rows[0]["input_ids"], rows[0]["assistant_masks"]) == expected_tokens(tokenizer, chat(question, answer))


def test_right_answers_of_sciq_are_spread_over_the_letters(tokenizer, tmp_path):
    source = str(write_jsonl(tmp_path / "rows.jsonl", [{**SCIQ, "question": f"{n}? {QUESTION}"} for n in range(80)]))
    rows, record = load_conversations(source, ChatEncoder(tokenizer), 999, False)
    assert record["format"] == "SciQ"
    letters = []
    for row in rows:
        question, *choices = row["messages"][0]["content"].splitlines()
        answer = row["messages"][1]["content"]
        assert question.endswith(QUESTION) and answer in choices and answer.endswith(". Carbon dioxide")
        assert sorted(choice[3:] for choice in choices) == ["Carbon dioxide", "Iron", "Salt", "Sand"]
        assert [choice[:3] for choice in choices] == ["A. ", "B. ", "C. ", "D. "]
        letters.append(answer[0])
    assert all(letters.count(letter) > 8 for letter in "ABCD")


def test_nested_column_of_the_auxiliary_mmlu(tokenizer, tmp_path):
    row, question, answer = ACADEMIC["MMLU"]
    classes = datasets.ClassLabel(names=list("ABCD"))
    features = {"question": datasets.Value("string"), "subject": datasets.Value("string"), "answer": classes}
    features["choices"] = datasets.List(datasets.Value("string"))
    nested = datasets.Dataset.from_list([{"train": row}], features=datasets.Features({"train": features}))
    nested.to_parquet(tmp_path / "rows.parquet")
    rows, record = load_conversations(str(tmp_path / "rows.parquet"), ChatEncoder(tokenizer), 999, False)
    assert record["format"] == "MMLU" and rows[0]["messages"] == chat(question, answer)


@pytest.mark.parametrize("name, column", [("HellaSwag", "label"), ("WinoGrande", "answer")])
def test_test_splits_without_answers_are_refused(tokenizer, tmp_path, name, column):
    source = str(write_jsonl(tmp_path / "rows.jsonl", [{**ACADEMIC[name][0], column: ""}]))
    with pytest.raises(InputError, match=r"Row 0 of .*test splits have no answers"):
        load_conversations(source, ChatEncoder(tokenizer), 999, False)


def test_weights_are_shares_and_every_conversation_is_in():
    parts = [
        datasets.Dataset.from_dict({"id": [part * 1000 + n for n in range(size)]}) for part, size in ((0, 300), (1, 40))
    ]
    mixed = mix(parts, [3.0, 1.0], seed=0)["id"][:]
    assert set(mixed) == set(parts[0]["id"]) | set(parts[1]["id"])
    assert 0.7 < sum(number < 1000 for number in mixed) / len(mixed) < 0.8
    assert sorted(mix(parts, None, seed=0)["id"]) == sorted([*parts[0]["id"], *parts[1]["id"]])


def test_academic_recipe_asks_the_hub_for_the_papers_mixture(monkeypatch):
    recipe = yaml.safe_load((REPOSITORY / "recipes" / "sft_academic.yaml").read_text())
    asked = []

    def load_dataset(path, split, name):
        asked.append((path, name, split))
        return datasets.Dataset.from_dict({"messages": []})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in recipe["sources"]:
        sources.load_source(source)
    assert dict(zip(asked, recipe["source_weights"])) == {
        ("cais/mmlu", "auxiliary_train", "train"): 40,
        ("allenai/sciq", None, "train"): 15,
        ("Rowan/hellaswag", None, "train"): 15,
        ("allenai/ai2_arc", "ARC-Challenge", "train"): 12,
        ("allenai/winogrande", "winogrande_xl", "train"): 10,
        ("allenai/ai2_arc", "ARC-Easy", "train"): 8,
    }
    sources.load_source("HuggingFaceH4/ultrachat_200k::train_sft")
    assert asked[-1] == ("HuggingFaceH4/ultrachat_200k", None, "train_sft")
