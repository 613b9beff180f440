"""Local files as the data of lm-eval's own tasks.

lm-eval's task definitions (prompt, choices, clean-up, metrics) stay as they are; only `dataset_path` is replaced, by a
folder laid out like the Hub dataset that the task reads. Files are found by name anywhere below --data-dir:

    mmlu_test*.parquet                                   question, subject, choices, answer     (cais/mmlu)
    arc_challenge_test*.parquet, arc_easy_test*.parquet  question, choices, answerKey           (allenai/ai2_arc)
    hellaswag_val*.parquet                   activity_label, ctx_a, ctx_b, endings, label       (Rowan/hellaswag)
    winogrande_val*.parquet                  sentence, option1, option2, answer                 (allenai/winogrande)
    wikitext*/test.txt, wikitext*/test.txt.gz            the file as distributed, cut at its article headings

Few-shot examples come from mmlu_dev*.parquet, and from files with `train` in place of `test` or `val`. Held-out text is
any source of data/text_sources.py; every source is a task of its own.
"""

import glob
import gzip
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path

import lm_eval
import pyarrow.compute
import pyarrow.parquet
import yaml
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from complexity_deep.workflow.command import InputError, first_line
from complexity_deep.workflow.data.text_sources import is_held_out, load_sources, read_documents

# Task -> the columns that it needs.
COLUMNS = {
    "mmlu": ("question", "subject", "choices", "answer"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "arc_easy": ("question", "choices", "answerKey"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "wikitext": ("page",),
}
TASKS = tuple(COLUMNS)
TASK_FOLDERS = ("mmlu/default", "hellaswag", "arc", "winogrande", "wikitext")  # of lm-eval; indexing all takes 10 s
FILE_NAMES = {"train": "train", "validation": "val", "test": "test", "dev": "dev"}  # split -> its part of a file name
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
HELD_OUT_DOCUMENTS = 2000  # of each source at most: the standard error is small by then
HELD_OUT_TASK = {
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "text",
    # `perplexity_row` computes that of words. Text without spaces is one word, whose loss is too large for `exp`.
    "metric_list": [
        {"metric": "word_perplexity", "aggregation": "bypass", "higher_is_better": False},
        {"metric": "byte_perplexity"},
        {"metric": "bits_per_byte"},
    ],
}


@dataclass
class StagedTasks:
    """Where the data of each task comes from."""

    benchmarks: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # those that have no local file
    hub_datasets: dict[str, str] = field(default_factory=dict)  # task -> what lm-eval would read from the Hub
    files: dict[str, Path] = field(default_factory=dict)  # task -> local file that is evaluated on
    notes: dict[str, str] = field(default_factory=dict)  # task -> what differs from the Hub's
    texts: dict[str, str] = field(default_factory=dict)  # task -> source of held-out text
    loaded: dict = field(default_factory=dict)  # what lm-eval made of it


def task_manager(*folders: Path) -> TaskManager:
    """lm-eval's index of the tasks above, and of those in `folders`."""
    root = Path(lm_eval.__file__).parent / "tasks"
    return TaskManager(include_defaults=False, include_path=[*(root / name for name in TASK_FOLDERS), *folders])


def find_file(data_dir: Path, task: str, split: str) -> Path | None:
    patterns = [f"{task}_{FILE_NAMES[split]}*.parquet"]
    if task == "wikitext":
        patterns = [f"wikitext*/{FILE_NAMES[split]}*.txt", f"wikitext*/{FILE_NAMES[split]}*.txt.gz"]
    # `glob` goes into folders that are links, and `Path.rglob` into hidden ones. Most files are found by both ways.
    names = (name for pattern in patterns for name in glob.glob(f"**/{pattern}", root_dir=data_dir, recursive=True))
    ways = [*map(data_dir.joinpath, names), *(path for pattern in patterns for path in data_dir.rglob(pattern))]
    found = sorted({path.resolve(): path for path in ways}.values())
    if len(found) > 1:
        raise InputError(f"{task} has more than one {split} file: {', '.join(map(str, found))}.")
    return found[0] if found else None


def read_pages(path: Path) -> pyarrow.Table:
    """Articles of a WikiText file: each begins at a heading of the first level, as in the Hub's document-level copy."""
    try:
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is not readable UTF-8 text: {error}.") from error
    pages = re.split(r"^(?= = [^=\n].* = $)", text, flags=re.MULTILINE)
    return pyarrow.table({"page": pyarrow.array([page for page in pages if page.strip()], "string")})


def is_usable(task: str, row: dict) -> bool:
    """Whether the answer of a question is among its choices."""
    try:
        if task == "mmlu":
            return len(row["choices"]) == 4 and row["answer"] in range(4)
        if task == "hellaswag":
            return int(row["label"]) in range(len(row["endings"]))
        if task == "winogrande":
            return "_" in row["sentence"] and row["answer"] in ("1", "2")
        return task == "wikitext" or row["answerKey"] in row["choices"]["label"]
    except (TypeError, KeyError, ValueError):
        return False


def read_table(path: Path, task: str) -> tuple[pyarrow.Table, str]:
    """The rows of a file, and what in them differs from the Hub's."""
    if task == "wikitext":
        table = read_pages(path)
    else:
        try:
            table = pyarrow.parquet.read_table(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"'{path}' is not a readable parquet file: {first_line(error)}") from error
    if not table.num_rows:
        raise InputError(f"'{path}' is empty: it holds no rows.")
    note = ""
    missing = [name for name in COLUMNS[task] if name not in table.column_names]
    if task == "hellaswag" and missing == ["activity_label", "ctx_a", "ctx_b"] and "ctx" in table.column_names:
        nothing = pyarrow.array([""] * table.num_rows)
        for name, column in (("activity_label", nothing), ("ctx_a", table["ctx"]), ("ctx_b", nothing)):
            table = table.append_column(name, column)
        note = "the file has no activity labels: prompts lack them, so not comparable with scores on the Hub's"
    elif missing:
        raise InputError(
            f"'{path}' is not data of {task}: no column {', '.join(missing)} among {', '.join(table.column_names)}."
        )
    rows = table.to_pylist()
    unusable = next((number for number, row in enumerate(rows) if not is_usable(task, row)), None)
    if unusable is not None:
        raise InputError(f"'{path}' is not data of {task}: in row {unusable} the answer is not one of the choices.")
    if task == "wikitext" and any("<unk>" in row["page"] for row in rows):
        note = "tokenised file with <unk> for rare words; the Hub's is the raw text"
    return table, note


def by_configuration(path: Path, table: pyarrow.Table, task: str, index: dict) -> dict[str, pyarrow.Table]:
    """Rows by the configuration that lm-eval loads: the subject for MMLU, one for everything else."""
    if task != "mmlu":
        return {index[task].cfg.get("dataset_name") or "default": table}
    configs = [entry.cfg for name, entry in index.items() if name.startswith("mmlu_") and entry.cfg]
    subjects = [config["dataset_name"] for config in configs if "dataset_name" in config]
    if different := set(table["subject"].to_pylist()) ^ set(subjects):
        examples = ", ".join(sorted(different)[:4])
        raise InputError(f"'{path}' must hold MMLU's {len(subjects)} subjects; missing or unknown: {examples}.")
    return {subject: table.filter(pyarrow.compute.field("subject") == subject) for subject in subjects}


def write_dataset(folder: Path, configurations: dict[str, dict[str, pyarrow.Table]]) -> dict:
    """Write {configuration: {split: table}} as a dataset repository; returns the override that makes a task read it."""
    folder.mkdir()
    front_matter = []
    for number, (name, tables) in enumerate(configurations.items()):
        files = []
        for split, table in tables.items():
            files.append({"split": split, "path": f"{number}-{split}.parquet"})
            pyarrow.parquet.write_table(table, folder / files[-1]["path"])
        front_matter.append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': front_matter})}---\n")
    return {"dataset_path": str(folder), "dataset_kwargs": {"cache_dir": str(folder.parent / "cache")}}


def stage_benchmark(folder: Path, staged: StagedTasks, task: str, data_dir: Path, num_fewshot: int) -> dict | None:
    """lm-eval's task with local files for data, as a group member; None if there is no file to evaluate on."""
    index = task_manager().task_index
    config = index["mmlu_anatomy" if task == "mmlu" else task].cfg
    evaluated = config.get("test_split") or config["validation_split"]
    files = {split: find_file(data_dir, task, split) for key in SPLIT_KEYS if (split := config.get(key))}
    if not files[evaluated]:
        return None
    examples = config.get("fewshot_split") or config["training_split"]
    if num_fewshot and task != "wikitext" and not files[examples]:
        raise InputError(
            f"The {num_fewshot} examples of {task} come from a file {task}_{FILE_NAMES[examples]}*.parquet, and there "
            f"is none below '{data_dir}'."
        )
    configurations: dict[str, dict[str, pyarrow.Table]] = {}
    for split, path in files.items():
        if path:
            table, note = read_table(path, task)
            for name, rows in by_configuration(path, table, task, index).items():
                configurations.setdefault(name, {})[split] = rows
            if split == evaluated:
                staged.notes[task] = note
    member = {"group" if task == "mmlu" else "task": task, **write_dataset(folder / task, configurations)}
    member.update({key: None for key in SPLIT_KEYS if config.get(key) and not files[config[key]]})
    if task == "hellaswag" and staged.notes[task]:
        member["doc_to_text"] = "{{query.removeprefix(': ')}}"  # what lm-eval puts between the label and the context
    staged.files[task] = files[evaluated]
    return member


def stage_text(folder: Path, staged: StagedTasks, source: str, fraction: float) -> dict:
    """A task for one source of held-out text."""
    texts = (text for text in read_documents(load_sources([source])) if is_held_out(text, fraction))
    texts = list(itertools.islice(texts, HELD_OUT_DOCUMENTS + 1))
    if not texts:
        raise InputError(f"The source '{source}' has no held-out document: raise --held-out-fraction (now {fraction}).")
    name = f"held_out_text_{len(staged.texts)}"
    if len(texts) > HELD_OUT_DOCUMENTS:
        texts.pop()
        staged.notes[name] = f"only the first {HELD_OUT_DOCUMENTS:,} documents of the text"
    data = write_dataset(folder / name, {"default": {"test": pyarrow.table({"text": texts})}})
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **HELD_OUT_TASK, **data}))
    staged.texts[name] = source
    return {"task": name}


def stage(
    folder: Path, tasks: list[str] | None, data_dir: Path | None, texts: list[str], fraction: float, num_fewshot: int
) -> StagedTasks:
    """Make every task ready in an empty folder; raises `InputError` for data that cannot be used.

    Without `data_dir`, benchmarks come from the Hub. Without `tasks`, all are taken, or those whose files are there.
    """
    if data_dir and not data_dir.is_dir():
        raise InputError(f"--data-dir '{data_dir}' is not a folder.")
    staged, names, members = StagedTasks(), [], []
    index = task_manager().task_index
    for task in TASKS if tasks is None else tasks:
        if data_dir is None:
            names.append(task)
        elif member := stage_benchmark(folder, staged, task, data_dir, num_fewshot):
            members.append(member)
        elif tasks is None:
            staged.left_out.append(task)
            continue
        else:
            raise InputError(
                f"There is no file for {task} below '{data_dir}'; workflow/evaluation/task_data.py has the names."
            )
        staged.benchmarks.append(task)
        staged.hub_datasets[task] = index["mmlu_anatomy" if task == "mmlu" else task].cfg["dataset_path"]
    members += [stage_text(folder, staged, source, fraction) for source in texts]
    if members:
        # A group written as YAML, because its members may override what lm-eval's tasks say, inside MMLU's groups too.
        (folder / "local.yaml").write_text(yaml.safe_dump({"group": "local", "task": members}, sort_keys=False))
        names.append("local")
    if not names:
        raise InputError(
            f"There is no file of any benchmark below '{data_dir}'; workflow/evaluation/task_data.py has the names."
        )
    try:
        staged.loaded = task_manager(folder).load(names)
    except Exception as error:  # the Hub client, the network and each file format raise classes of their own
        reason = first_line(error)
        hint = "; local files are taken with --data-dir" if data_dir is None else ""
        raise InputError(f"The data of {', '.join(staged.benchmarks)} cannot be read: {reason}{hint}") from error
    for task in staged.loaded["tasks"].values():
        task.set_config("num_fewshot", num_fewshot if task.OUTPUT_TYPE == "multiple_choice" else 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return staged
