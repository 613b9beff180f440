"""Conversations, and what becomes of them, for the tests of the data and of fine-tuning."""

import json
from itertools import islice
from pathlib import Path

from complexity_deep.workflow.data.text_sources import embedded_documents
from complexity_deep.workflow.data.tokenizer_training import train_bpe

LENGTH = 96


def chat_tokenizer():
    """A tokenizer of 500 tokens with ChatML."""
    texts = (text[:1000] for text in islice(embedded_documents(), 60))
    return train_bpe(texts, vocab_size=500, model_max_length=LENGTH)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def chat(*texts: str, system: str | None = None) -> list[dict]:
    """Turns of user and assistant."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]


def expected_tokens(tokenizer, messages: list[dict], learned_from: int = 0) -> tuple[list[int], list[int]]:
    """Token ids and mask of ChatML, put together piece by piece, without the template."""
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids, mask = [], []
    for index, message in enumerate(messages):
        header = [start, *tokenizer(message["role"] + "\n")["input_ids"]]
        content = [*tokenizer(message["content"].strip())["input_ids"], end]
        newline = tokenizer("\n")["input_ids"]
        learned = message["role"] == "assistant" and index >= learned_from
        ids += header + content + newline
        mask += [0] * len(header) + [int(learned)] * len(content) + [0] * len(newline)
    return ids, mask


# Rows as the Hub has them, with what they become.
QUESTION = "What do plants take from the air?"
ACADEMIC = {
    "MMLU": (
        {"question": QUESTION, "subject": "", "choices": ["Iron", "Carbon dioxide", "Salt", "Sand"], "answer": 1},
        f"{QUESTION}\nA. Iron\nB. Carbon dioxide\nC. Salt\nD. Sand",
        "B. Carbon dioxide",
    ),
    "ARC": (
        {
            "id": "MCAS_2000_4_6",
            "question": QUESTION,
            "choices": {"text": ["Iron", "Salt", "Carbon dioxide"], "label": ["1", "2", "3"]},
            "answerKey": "3",
        },
        f"{QUESTION}\nA. Iron\nB. Salt\nC. Carbon dioxide",
        "C. Carbon dioxide",
    ),
    "HellaSwag": (
        {
            "ind": 4,
            "activity_label": "Gardening",
            "ctx_a": "[header] How to plant a tree [title] Dig.",
            "ctx_b": "a man",
            "ctx": "[header] How to plant a tree [title] Dig. A man",
            "endings": ["digs a hole. [substeps] Slowly.", "sings.", "swims.", "sleeps."],
            "source_id": "wikihow~1",
            "split": "train",
            "split_type": "indomain",
            "label": "0",
        },
        "How does this text continue?\nHow to plant a tree Dig. A man\n"
        "A. digs a hole. Slowly.\nB. sings.\nC. swims.\nD. sleeps.",
        "A. digs a hole. Slowly.",
    ),
    "WinoGrande": (
        {"sentence": "Ann gave Bea a tree because _ liked trees.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        "Which choice belongs in the blank?\nAnn gave Bea a tree because _ liked trees.\nA. Ann\nB. Bea",
        "B. Bea",
    ),
    "Dolly": (
        {"instruction": "Which colour?", "context": "Leaves are green.", "response": "Green.", "category": "closed_qa"},
        "Which colour?\n\nLeaves are green.",
        "Green.",
    ),
    "Alpaca": (
        {"instruction": "Name a tree.", "input": "", "output": "Oak.", "text": "Below is an instruction ..."},
        "Name a tree.",
        "Oak.",
    ),
    "instruction and output": ({"instruction": "Name a tree.", "output": "Oak."}, "Name a tree.", "Oak."),
    "instruction and response": ({"instruction": "Name a tree.", "response": "Oak."}, "Name a tree.", "Oak."),
}
SCIQ = {
    "question": QUESTION,
    "distractor3": "Iron",
    "distractor1": "Salt",
    "distractor2": "Sand",
    "correct_answer": "Carbon dioxide",
    "support": "",
}
