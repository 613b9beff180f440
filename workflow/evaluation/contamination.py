"""Which benchmarks a model was fine-tuned on, from the record that fine-tuning leaves."""

import json
import re
from pathlib import Path

from complexity_deep.workflow.command import InputError

# Task -> how sft_data.json may call its data.
TRAINING_DATA = {
    "mmlu": "mmlu",
    "hellaswag": "hellaswag",
    "arc_challenge": "(?<![a-z])arc[^a-z]*c(hallenge)?(?![a-z])",
    "arc_easy": "(?<![a-z])arc[^a-z]*e(asy)?(?![a-z])",
    "winogrande": "winogrande",
}


def read_training_data(model: str) -> list[dict]:
    """The mixture that the model was fine-tuned on, as sft.py recorded it."""
    path = Path(model, "sft_data.json")
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text())
        if not isinstance(records, list):
            raise TypeError("no list")
        for record in records:
            record["source"] = f"{record['name']} {record.get('configuration') or ''}".strip()
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"'{path}' is not a list of sources as scripts/sft.py writes it ({error!r}).") from error
    return records


def contamination(task: str, records: list[dict]) -> str:
    """Which part of the fine-tuning data came from this benchmark."""
    found = [
        f"{record['source']} ({record.get('split')}, {record.get('rows')} rows)"
        for record in records
        if task in TRAINING_DATA and re.search(TRAINING_DATA[task], record["source"], re.IGNORECASE)
    ]
    return f"fine-tuned on {', '.join(found)}" if found else ""
