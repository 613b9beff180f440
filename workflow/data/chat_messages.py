"""Chat messages as a template takes them, and what a template looks up in them."""

import json

import datasets
from jinja2 import meta, nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

MESSAGE_KEYS = ("role", "content")  # that every template renders
JSON_FEATURE = getattr(datasets, "Json", ())  # newer versions keep objects of differing keys as they are


def from_json(value, name: str):
    """A list that may have been stored as a JSON string, and its entries too."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
        value = [json.loads(entry) if isinstance(entry, str) else entry for entry in value or []]
    except (TypeError, ValueError) as error:
        raise ValueError(f"its {name} is neither a list nor one written as JSON") from error
    if not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f"its {name} is not a list of JSON objects")
    return value


def without_fill(value, feature):
    """`value` without the keys that Arrow filled with nulls, because other rows have them; JSON columns have none."""
    if isinstance(feature, JSON_FEATURE):
        return value
    if isinstance(value, dict):
        features = feature if isinstance(feature, dict) else {}
        return {key: without_fill(entry, features.get(key)) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_fill(entry, getattr(feature, "feature", None)) for entry in value]
    return value


def check_message(message: dict, number: int) -> dict:
    """A message as the template takes it; ValueError where it is none."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"its message {number} is not an object with a role and a content")
    message = {key: value for key, value in message.items() if value is not None and value != []}
    if "tool_calls" in message:
        message["tool_calls"] = from_json(message["tool_calls"], f"message {number}'s tool_calls")
        message.setdefault("content", "")
    if "content" not in message:
        raise ValueError(f"its message {number} has no content")
    content = message["content"]
    if not isinstance(content, str):
        raise ValueError(f"the content of its message {number} is not text, but a {type(content).__name__}")
    # Stripped, because white space at an edge would melt into one token with the newline of the template.
    return {**message, "content": content.strip()}


def check_turns(given: list[dict], learned: list[dict]) -> list[dict]:
    """All messages, their contents stripped; ValueError if they are no conversation."""
    if not isinstance(given, list) or not isinstance(learned, list):
        raise ValueError("its messages are not a list")
    messages = [check_message(message, number) for number, message in enumerate([*given, *learned])]
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if not roles:
        raise ValueError("it has no messages")
    if roles[0] != "user":
        raise ValueError(f"it starts with the {roles[0]}; a conversation starts with the user, or a system message")
    if all(message["role"] != "assistant" for message in messages[len(given) :]):
        raise ValueError("there is nothing to learn in it, for the assistant says nothing")
    return messages


def root_of(node: nodes.Node) -> str | None:
    """The variable of `x`, `x[0]`, `x[1:]` and `x | filter`; None for `x.key` and all else."""
    while True:
        if isinstance(node, nodes.Name):
            return node.name
        by_key = (
            isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)
        )
        if by_key or not isinstance(node, nodes.Getitem | nodes.Filter):
            return None
        node = node.node


def message_variables(tree: nodes.Template) -> set[str]:
    """`messages`, and what is set to it, to a part of it or to each message of it in turn."""
    found, before = {"messages"}, set()
    while found != before:
        before = set(found)
        for node in tree.find_all((nodes.For, nodes.Assign)):
            value = node.iter if isinstance(node, nodes.For) else node.node
            if isinstance(node.target, nodes.Name) and root_of(value) in found:
                found.add(node.target.name)
    return found


def key_of(node: nodes.Node) -> tuple[nodes.Node, str] | None:
    """Object and key of `x.key`, `x["key"]`, `x.get("key")` and `"key" in x`."""
    if isinstance(node, nodes.Getattr):
        return node.node, node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.node, node.arg.value
    if isinstance(node, nodes.Compare) and isinstance(node.expr, nodes.Const):
        return node.ops[0].expr, node.expr.value
    is_get = isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "get"
    if is_get and node.args and isinstance(node.args[0], nodes.Const):
        return node.node.node, node.args[0].value
    return None


def looked_up(template: str) -> tuple[list[str], list[str]]:
    """Keys that a template looks up in messages, and variables beside `messages` that it takes."""
    environment = _compile_jinja_template(template).environment
    tree = environment.parse(template)
    messages = message_variables(tree)
    found = map(key_of, tree.find_all((nodes.Getattr, nodes.Getitem, nodes.Compare, nodes.Call)))
    keys = {key for place in found if place for node, key in [place] if root_of(node) in messages}
    variables = meta.find_undeclared_variables(tree) - set(environment.globals) - {"messages", "add_generation_prompt"}
    # Lists, for `datasets` hashes what is in the encoder, and the order of a set differs from process to process.
    return sorted(map(str, keys)), sorted(variables)
