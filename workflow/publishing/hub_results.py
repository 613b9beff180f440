"""Scores in the forms that the Hub reads: the model-index of a card, and files of .eval_results/."""

from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from complexity_deep.workflow.publishing.run_reports import Run, is_hub_id

LIMITED = "only the first"  # what evaluate.py notes of a result with --limit


def hub_dataset(row: dict) -> tuple[str, str | None] | None:
    """Id and configuration of the Hub's dataset that a result is of; None where it is of some other text."""
    dataset = row.get("hub_dataset", row.get("dataset"))
    name, _, configuration = (dataset or "").partition(":")
    return (name, configuration or None) if is_hub_id(name) else None


def whole_results(run: Run, kind: str) -> list[dict]:
    """Results that may stand for a dataset of the Hub: of all of it, not of its first documents (--limit)."""
    if not run.evaluation or run.evaluation.get("limit"):
        return []
    rows = [row for row in run.evaluation[kind] if hub_dataset(row)]
    return [row for row in rows if LIMITED not in (row.get("note") or "")]


def eval_results(run: Run) -> list[EvalResult]:
    """Entries of the model-index: one per metric of a dataset of the Hub."""
    common = {"task_type": "text-generation", "task_name": "Text generation"}
    results = [
        EvalResult(
            **common,
            dataset_type=hub_dataset(row)[0],
            dataset_name=row["task"],
            dataset_config=row["task"],  # two tasks of one dataset would become one entry without it
            dataset_args={"num_few_shot": row["num_fewshot"]},
            metric_type=row["metric"],
            metric_name=row["metric"],
            metric_value=row["value"],
        )
        for row in whole_results(run, "tasks")
    ]
    results += [
        EvalResult(
            **common,
            dataset_type=hub_dataset(row)[0],
            dataset_name=row["corpus"],
            dataset_config=hub_dataset(row)[1] or row["corpus"],
            metric_type=metric,
            metric_name=metric,
            metric_value=row[metric],
        )
        for row in whole_results(run, "perplexity")
        for metric in ("perplexity", "bits_per_byte")
    ]
    return results


def write_eval_results(run: Run, folder: Path) -> None:
    """`.eval_results/TASK.yaml`, for benchmarks whose data is a dataset of the Hub."""
    harness = run.evaluation["harness"]
    entries: dict[str, list[EvalResultEntry]] = {}
    for row in whole_results(run, "tasks"):
        dataset = hub_dataset(row)[0]
        notes = [f"{row['metric']}, {row['num_fewshot']}-shot, {harness['name']} {harness['version']}"]
        notes += [f"data from the file {row['dataset']}"] if row["dataset"] != dataset else []
        notes += [f"stderr {row['stderr']:.4f}"] if row["stderr"] else []
        notes += [row["note"]] if row.get("note") else []
        entry = EvalResultEntry(
            dataset_id=dataset,
            task_id=row["task"],
            value=row["value"],
            date=run.evaluation.get("date"),
            notes="; ".join(notes),
        )
        entries.setdefault(row["task"], []).append(entry)
    for task, results in entries.items():
        (folder / ".eval_results").mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml(results), sort_keys=False, allow_unicode=True)
        (folder / ".eval_results" / f"{task}.yaml").write_text(text, encoding="utf-8")
