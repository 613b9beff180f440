"""Show what a source of text or of conversations holds, before a run is started on it.

    python scripts/show_data.py embedded 'data/edu/*.parquet'
    python scripts/show_data.py --conversations allenai/ai2_arc:ARC-Easy 'data/*.jsonl'

Prints the first document of each source and how much text it has, or the first conversation and how many there are.
"""

import argparse
import itertools
import json

from complexity_deep.workflow.command import ArgumentParser, InputError, needs, run_script

with needs("train"):
    from complexity_deep.workflow.data.chat_messages import check_turns
    from complexity_deep.workflow.data.conversation_formats import format_of, turns_of
    from complexity_deep.workflow.data.conversations import load_source
    from complexity_deep.workflow.data.text_sources import load_sources, read_documents


MOST = 10_000  # documents to read of a source, which may be as large as the Web


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+", help="'embedded', file patterns, or owner/name:configuration on the Hub")
    parser.add_argument("--conversations", action="store_true", help="the sources hold conversations, not text")
    parser.add_argument("--text-column", default="text", help="column that holds the text, except in .txt files")
    return parser.parse_args()


def show_text(source: str, text_column: str) -> None:
    texts = list(itertools.islice(read_documents(load_sources([source], text_column=text_column)), MOST))
    print(texts[0])
    first = "the first " if len(texts) == MOST else ""
    print(f"# {source}: {first}{len(texts):,} documents, {sum(len(text.encode()) for text in texts):,} bytes")


def show_conversation(source: str) -> None:
    rows, record = load_source(source)
    name = format_of(rows, source)
    print(f"# {source}: {len(rows):,} rows of {record['split']}, {name} format")
    try:
        messages = check_turns(*turns_of(rows[0], name))
    except ValueError as error:
        raise InputError(f"Row 0 of '{source}' is no conversation ({name} format): {error}.") from error
    for message in messages:
        calls = "".join(f" {json.dumps(call)}" for call in message.get("tool_calls", []))
        print(f"{message['role']}: {message['content']}{calls}")


def main(args: argparse.Namespace) -> None:
    for source in args.sources:
        if args.conversations:
            show_conversation(source)
        else:
            show_text(source, args.text_column)


if __name__ == "__main__":
    run_script(main, parse_args())
