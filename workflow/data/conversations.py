"""Conversations to fine-tune on: where they come from, the formats they come in, and which of their tokens are learned.

    python scripts/show_data.py --conversations allenai/ai2_arc:ARC-Easy 'data/*.jsonl'

prints the first conversation of each source. A source is one of

    HuggingFaceH4/ultrachat_200k::train_sft   a Hub dataset, its configuration and split (train if left out)
    "data/sft/*.parquet"                      local files: .parquet, .jsonl or .json

and its format is known by its columns, see FORMATS: chat messages, prompt and completion, Dolly, Alpaca, or one of the
multiple-choice sets, whose rows become a question with lettered choices and an answer such as "B. the Moon".

A chat message may have more than its role and content: tool_calls, reasoning_content, name, tool_call_id, or what else
the chat template renders. So may a row: tools, a list of JSON schemas. Either may be a JSON string. What the template
does not render is refused, for the model would learn from less than the conversation.
"""

import copy

import datasets
from jinja2 import TemplateError
from trl.chat_template_utils import get_training_chat_template

from complexity_deep.workflow.command import InputError, first_line
from complexity_deep.workflow.data.chat_messages import MESSAGE_KEYS, check_turns, from_json, looked_up, without_fill
from complexity_deep.workflow.data.conversation_formats import (
    CHAT_FORMATS,
    ROW_KEYS,
    SYSTEM_COLUMNS,
    exchange,
    format_of,
    turns_of,
)
from complexity_deep.workflow.data.sources import builder_of, files_of_pattern, is_hub_name, mix
from complexity_deep.workflow.data.text_sources import is_held_out


def load_source(source: str) -> tuple[datasets.Dataset, dict]:
    """The rows of a source, and its name, configuration and split for the record."""
    configuration, split = "", "train"
    path = builder_of(source)
    if path and path != "text":
        name, options = source, {"data_files": files_of_pattern(source)}
    else:
        name, configuration, split, *rest = [*source.split(":"), "", ""]
        path, split, options = name, split or "train", {"name": configuration or None}
        if not is_hub_name(name) or any(rest):
            raise InputError(
                f"Unknown source '{source}': it is not a file or pattern ending in .parquet, .jsonl or .json, and not "
                "a Hub dataset written owner/name, owner/name:configuration or owner/name:configuration:split."
            )
    try:
        rows = datasets.load_dataset(path, split=split, **options)
    except Exception as error:  # the Hub client, the network and each file format raise classes of their own
        if isinstance(error.__cause__ or error, StopIteration) or "corresponds to no data" in str(error):
            raise InputError(f"The source '{source}' is empty: it holds no rows.") from error
        raise InputError(f"The source '{source}' cannot be read: {first_line(error.__cause__ or error)}") from error
    if rows.column_names == ["train"]:  # how the Hub has MMLU's auxiliary_train
        rows = rows.flatten().rename_columns({f"train.{column}": column for column in rows.features["train"]})
    return rows, {"name": name, "configuration": configuration or None, "split": split}


class ChatEncoder:
    """Conversations to token ids, with a mask of what the assistant says, end-of-turn token included."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        if tokenizer.chat_template is None:
            raise InputError(
                "The tokenizer has no chat template: give one with --chat-template-path template.jinja, or use a "
                "tokenizer of scripts/train_tokenizer.py, which has one."
            )
        try:
            # Well-known templates without marks have a twin with them in TRL.
            self.template = get_training_chat_template(tokenizer)
        except ValueError as error:
            raise InputError(
                "The chat template has no {% generation %} marks around what the assistant says, so nobody knows what "
                "to learn: put them in, or give another template with --chat-template-path."
            ) from error
        try:
            ids, mask = self.render([*exchange("question", "answer"), {"role": "user", "content": "question"}])
        except TemplateError as error:
            raise InputError(f"The chat template cannot be rendered: {error}") from error
        learned = [token for token, kept in zip(ids, mask) if kept]
        while learned and not tokenizer.decode(learned[-1]).strip():
            learned.pop()  # a newline after the end-of-turn token
        if not learned or learned[-1] not in tokenizer.added_tokens_decoder:
            raise InputError(
                "The {% generation %} marks of the chat template leave out the end-of-turn token, so that the model "
                "would never learn to stop: move {% endgeneration %} behind it."
            )
        self.end_of_turn_id: int = learned[-1]
        self.message_keys, self.variables = looked_up(tokenizer.get_chat_template(self.template))

    def render(self, messages: list[dict], **variables) -> tuple[list[int], list[int]]:
        rendered = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},  # not a warning for each long one
            **variables,
        )
        return rendered["input_ids"], rendered["assistant_masks"]

    def variables_of(self, row: dict) -> dict:
        """What a row has for the template beside its messages; ValueError for what the template does not take."""
        found = {key: row[key] for key in row if key in {*ROW_KEYS, *self.variables} - {*SYSTEM_COLUMNS}}
        if "tools" in found:
            found["tools"] = from_json(found["tools"], "tools")
        found.update(found.pop("chat_template_kwargs", None) or {})
        found = {key: value for key, value in found.items() if value not in (None, [], {}, "")}
        if unused := [key for key in found if key not in self.variables]:
            raise ValueError(f"the chat template does not render its {unused[0]}; give a template that does")
        return found

    def check_rendered(self, messages: list[dict], variables: dict) -> None:
        """ValueError where the template leaves out a key of a message."""
        for number, message in enumerate(messages):
            for key in message.keys() - {*MESSAGE_KEYS, *self.message_keys}:
                # A template may also render messages whole, without looking up their keys.
                without = copy.deepcopy(messages)
                del without[number][key]
                if self.render(without, **variables) == self.render(messages, **variables):
                    raise ValueError(
                        f"the chat template does not render the {key} of its message {number}; give a template that "
                        "does, or remove it"
                    )

    def __call__(self, row: dict, index: int, source: str, format_name: str, features: dict | None = None) -> dict:
        row = {key: without_fill(value, (features or {}).get(key)) for key, value in row.items()}
        try:
            given, learned = turns_of(row, format_name)
            messages = check_turns(given, learned)
            variables = self.variables_of(row) if format_name in CHAT_FORMATS else {}
            self.check_rendered(messages, variables)
            ids, mask = self.render(messages, **variables)
            # What the assistant said in the prompt is not learned.
            start = len(self.render(messages[: len(given)], **variables)[0]) if given else 0
        except (TemplateError, TypeError) as error:  # the latter of an operation inside the template
            raise InputError(f"The chat template cannot render row {index} of '{source}': {error}") from error
        except ValueError as error:
            raise InputError(
                f"Row {index} of '{source}' is no conversation ({format_name} format): {error}."
            ) from error
        mask = [0] * start + mask[start:]
        texts = [{key: message[key] for key in MESSAGE_KEYS} for message in messages]
        return {"messages": texts, "input_ids": ids, "assistant_masks": mask, "length": len(ids)}


def load_conversations(
    source: str, encoder: ChatEncoder, max_length: int, drop_long: bool, num_proc: int | None = None
) -> tuple[datasets.Dataset, dict]:
    """Encoded conversations (messages, input_ids, assistant_masks, length) of a source, and the record of it."""
    rows, record = load_source(source)
    record["format"] = format_of(rows, source)
    rows = rows.map(
        encoder,
        with_indices=True,
        fn_kwargs={"source": source, "format_name": record["format"], "features": dict(rows.features)},
        remove_columns=rows.column_names,
        features=datasets.Features(
            {
                "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
                "input_ids": datasets.List(datasets.Value("int32")),
                "assistant_masks": datasets.List(datasets.Value("int8")),
                "length": datasets.Value("int32"),
            }
        ),
        num_proc=num_proc,
        desc=f"reading {source}",
    )
    lengths = rows["length"][:]
    fitting = [index for index, length in enumerate(lengths) if length <= max_length]
    record["too_long"] = len(rows) - len(fitting)
    if record["too_long"] and not drop_long:
        longest = max(range(len(rows)), key=lengths.__getitem__)
        raise InputError(
            f"{record['too_long']:,} of {len(rows):,} conversations of '{source}' are longer than max_length "
            f"{max_length} (row {longest} has {lengths[longest]:,} tokens); cutting them would lose the ends of "
            "answers, so raise max_length, or leave these conversations out with --drop-long-conversations."
        )
    rows = rows.select(fitting)
    if len(rows) == 0:
        raise InputError(f"The source '{source}' holds no conversation of at most {max_length} tokens.")
    return rows, record


def split_held_out(rows: datasets.Dataset, fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Conversations to train on and those held out, by the hash of their text."""
    held_out, kept = [], []
    for index, messages in enumerate(rows["messages"]):
        text = "\n".join(message["content"] for message in messages)
        (held_out if is_held_out(text, fraction) else kept).append(index)
    return rows.select(kept), rows.select(held_out)


def shuffled_mix(parts: list[datasets.Dataset], weights: list[float] | None, seed: int) -> datasets.Dataset:
    """The parts mixed (`sources.mix`) and shuffled. Without weights, each conversation is in it once."""
    return mix(parts, weights, seed).shuffle(seed=seed)
