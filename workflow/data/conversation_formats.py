"""The formats in which conversations come: which columns tell one, and how a row becomes turns."""

import hashlib
import re
import string
from collections.abc import Callable

import datasets

from complexity_deep.workflow.command import InputError

# What a row becomes: the turns given to the model, and those from which it learns what the assistant says.
Turns = tuple[list[dict], list[dict]]


def exchange(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def multiple_choice(question: str, choices: list[str], answer: int) -> Turns:
    if len(choices) > len(string.ascii_uppercase):
        raise InputError(f"it has {len(choices)} choices, which is more than there are letters")
    if not 0 <= answer < len(choices):
        raise InputError(f"its answer is number {answer} of {len(choices)} choices; test splits have no answers")
    lettered = [f"{letter}. {choice.strip()}" for letter, choice in zip(string.ascii_uppercase, choices)]
    return [], exchange("\n".join([question.strip(), *lettered]), lettered[answer])


def from_prompt(row: dict) -> Turns:
    prompt, completion = row["prompt"], row["completion"]
    return ([], exchange(prompt, completion)) if isinstance(prompt, str) else (prompt, completion)


def from_instruction(row: dict, answer: str) -> Turns:
    """Earlier exchanges, then the instruction with what it is about, then the column `answer`."""
    earlier = [message for pair in row.get("history") or [] for message in exchange(*pair)]
    parts = [row["instruction"].strip(), row.get("input"), row.get("context")]
    return [], [*earlier, *exchange("\n\n".join(str(part) for part in parts if part).strip(), row[answer])]


def from_arc(row: dict) -> Turns:
    labels = row["choices"]["label"]  # letters, or the digits from 1 on
    return multiple_choice(row["question"], row["choices"]["text"], labels.index(row["answerKey"]))


def from_sciq(row: dict) -> Turns:
    choices = [row["correct_answer"], row["distractor1"], row["distractor2"], row["distractor3"]]
    # An order that depends on the texts alone, because the right one has a column of its own.
    choices.sort(key=lambda choice: hashlib.blake2b(f"{row['question']}|{choice}".encode()).digest())
    return multiple_choice(row["question"], choices, choices.index(row["correct_answer"]))


def from_hellaswag(row: dict) -> Turns:
    def clean(text: str) -> str:  # texts from WikiHow have marks such as [title] left in them
        return " ".join(re.sub(r"\[\w+\]", " ", text).split())

    question = f"How does this text continue?\n{clean(row['ctx'])}"
    return multiple_choice(question, [clean(ending) for ending in row["endings"]], int(row["label"] or -1))


def from_winogrande(row: dict) -> Turns:
    question = f"Which choice belongs in the blank?\n{row['sentence']}"
    return multiple_choice(question, [row["option1"], row["option2"]], int(row["answer"] or 0) - 1)


CHAT_FORMATS = ("chat", "prompt and completion")  # whose messages, and tools, are for the template
# Columns that belong to a conversation, unlike ids, sources and scores of it.
ROW_KEYS = ("tools", "documents", "functions", "chat_template_kwargs")
SYSTEM_COLUMNS = ("system", "system_prompt")  # the system message, where it is no message
# Name -> the columns by which a format is known, and what makes turns of a row; the first that fits is taken.
FORMATS: dict[str, tuple[set[str], Callable[[dict], Turns]]] = {
    "chat": ({"messages"}, lambda row: ([], row["messages"])),
    "prompt and completion": ({"prompt", "completion"}, from_prompt),
    "Dolly": ({"instruction", "context", "response"}, lambda row: from_instruction(row, "response")),
    "Alpaca": ({"instruction", "input", "output"}, lambda row: from_instruction(row, "output")),
    "instruction and output": ({"instruction", "output"}, lambda row: from_instruction(row, "output")),
    "instruction and response": ({"instruction", "response"}, lambda row: from_instruction(row, "response")),
    "MMLU": (
        {"question", "choices", "answer"},
        lambda row: multiple_choice(row["question"], row["choices"], row["answer"]),
    ),
    "ARC": ({"question", "choices", "answerKey"}, from_arc),
    "SciQ": ({"question", "correct_answer", "distractor1", "distractor2", "distractor3"}, from_sciq),
    "HellaSwag": ({"ctx", "endings", "label"}, from_hellaswag),
    "WinoGrande": ({"sentence", "option1", "option2", "answer"}, from_winogrande),
}


def format_of(rows: datasets.Dataset, source: str) -> str:
    for name, (columns, _) in FORMATS.items():
        if columns <= set(rows.column_names):
            return name
    raise InputError(
        f"The source '{source}' has no column 'messages', nor 'prompt' and 'completion', nor those of another known "
        f"format ({', '.join(list(FORMATS)[2:])}); its columns are: {', '.join(rows.column_names)}."
    )


def with_system_message(row: dict, given: list[dict], learned: list[dict]) -> Turns:
    """The turns behind the system message that a row may have in a column of its own."""
    column = next((name for name in SYSTEM_COLUMNS if row.get(name)), None)
    if column is None:
        return given, learned
    message, first = {"role": "system", "content": row[column]}, [*given, *learned][:1]
    if first == [message]:
        return given, learned
    if first and first[0]["role"] == "system":
        raise InputError(f"its column {column} says other than its system message")
    return ([message, *given], learned) if given else (given, [message, *learned])


def turns_of(row: dict, format_name: str) -> tuple[list[dict], list[dict]]:
    """`FORMATS[format_name]` on a row, with ValueError for values that are missing or of another type."""
    columns, make_turns = FORMATS[format_name]
    try:
        return with_system_message(row, *make_turns(row))
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"a value of {', '.join(sorted(columns))} is missing, or not what this format has there"
        ) from error
