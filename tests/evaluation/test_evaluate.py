"""scripts/evaluate.py, its data and its metric, on small files of the real schemas made here."""

import json
import math
import os
import random
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from complexity_deep.scripts import evaluate as script
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.tokenizer_training import train_bpe
from complexity_deep.workflow.evaluation import task_data
from complexity_deep.workflow.evaluation.contamination import contamination
from complexity_deep.workflow.evaluation.harness import HarnessModel
from complexity_deep.workflow.evaluation.perplexity import perplexity_metrics, perplexity_scores, token_nll
from complexity_deep.workflow.evaluation.task_data import find_file, stage, task_manager
from support import REPOSITORY

CONTEXT, VOCABULARY = 96, 300
WORDS = ["stone", "river", "light", "wind", "glass", "metal", "seed", "cloud", "salt", "fire", "north", "paper"]
SUBJECTS = [
    entry.cfg["dataset_name"]
    for name, entry in task_manager().task_index.items()
    if name.startswith("mmlu_") and "dataset_name" in (entry.cfg or {})
]


def phrase(generator: random.Random, low: int = 1, high: int = 4) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(low, high)))


def mmlu_rows(generator: random.Random, per_subject) -> list[dict]:
    return [
        {
            "question": f" {phrase(generator, 3, 9)}? ",
            "subject": subject,
            "choices": [phrase(generator) for _ in range(4)],
            "answer": generator.randrange(4),
        }
        for number, subject in enumerate(SUBJECTS)
        for _ in range(per_subject(number))
    ]


def arc_rows(generator: random.Random, count: int) -> list[dict]:
    rows = []
    for number in range(count):
        choices = generator.choice([3, 4, 4, 4, 5])
        labels = [str(1 + index) if number % 5 == 0 else "ABCDE"[index] for index in range(choices)]
        texts = [phrase(generator) for _ in range(choices)]
        rows.append(
            {
                "id": f"q{number}",
                "question": phrase(generator, 4, 9),
                "choices": {"text": texts, "label": labels},
                "answerKey": generator.choice(labels),
            }
        )
    return rows


def hellaswag_rows(generator: random.Random, count: int) -> list[dict]:
    rows = []
    for number in range(count):
        first, second = f"{phrase(generator, 4, 8)}.", phrase(generator)
        if number % 2:
            first, second = f"[header] {phrase(generator)} [title] {phrase(generator)} [step]  {first}", ""
        rows.append(
            {
                "ind": number,
                "activity_label": phrase(generator).title(),
                "ctx_a": first,
                "ctx_b": second,
                "ctx": f"{first} {second}".strip(),
                "endings": [f"{phrase(generator)} [substeps]  {phrase(generator)}." for _ in range(4)],
                "label": str(generator.randrange(4)),
            }
        )
    return rows


def winogrande_rows(generator: random.Random, count: int) -> list[dict]:
    return [
        {
            "sentence": f"{phrase(generator, 2, 5)} _ {phrase(generator, 2, 5)}.",
            "option1": phrase(generator, 1, 2),
            "option2": phrase(generator, 1, 2),
            "answer": generator.choice("12"),
        }
        for _ in range(count)
    ]


def wikitext(generator: random.Random, articles: int) -> str:
    text = " \n"
    for _ in range(articles):
        text += f" = {phrase(generator)} = \n \n {phrase(generator, 30, 60)} @-@ {phrase(generator)} . \n"
        text += f" = = {phrase(generator)} = = \n \n {phrase(generator, 60, 120)} , <unk> . \n \n"
    return text


def write(path: Path, rows: list[dict]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def make_data(folder: Path, seed: int, count: int, per_subject) -> dict[str, list[dict]]:
    """Files of every benchmark; returns their rows by file name."""
    folder.mkdir(exist_ok=True)
    generator = random.Random(seed)
    files = {
        "mmlu_test": mmlu_rows(generator, per_subject),
        "mmlu_dev": mmlu_rows(generator, lambda number: 5),
        "arc_challenge_test": arc_rows(generator, count),
        "arc_easy_test": arc_rows(generator, count),
        "hellaswag_val": hellaswag_rows(generator, count),
        "winogrande_val": winogrande_rows(generator, count),
        **{f"{name}_train": arc_rows(generator, 9) for name in ("arc_challenge", "arc_easy")},
        "hellaswag_train": hellaswag_rows(generator, 9),
        "winogrande_train": winogrande_rows(generator, 9),
    }
    for name, rows in files.items():
        write(folder / f"{name}.parquet", rows)
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "test.txt").write_text(wikitext(generator, 5))
    write(folder / "held_out.parquet", [{"text": phrase(generator, 5, 200)} for _ in range(12)])
    return files


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "small"


@pytest.fixture(scope="module")
def rows(data):
    return make_data(data, seed=0, count=12, per_subject=lambda number: 2 + number % 3)


def save_model(folder: Path, model) -> Path:
    model.save_pretrained(folder)
    tokenizer = train_bpe(iter([" ".join(WORDS), "A B C D Question Answer : ? ."] * 20), VOCABULARY, CONTEXT)
    tokenizer.save_pretrained(folder)
    return folder


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, **shape)
    # Weights of this size make distributions far from uniform, so that no two choices tie.
    config.initializer_range = 0.5
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "llama", llama())


@pytest.fixture(scope="module")
def our_folder(tmp_path_factory):
    from support import tiny_model

    model = tiny_model(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
    return save_model(tmp_path_factory.mktemp("model") / "ours", model)


def evaluate(model: Path, output: Path, *options) -> dict:
    """What the script writes, run in this process."""
    argv, sys.argv = sys.argv, ["evaluate.py", str(model), "--output-dir", str(output), *map(str, options)]
    try:
        script.main(script.parse_args())
    finally:
        sys.argv = argv
    return json.loads((output / "evaluation.json").read_text())


def scores(report: dict) -> dict[tuple, float]:
    return {(row["task"], row["metric"]): row["value"] for row in report["tasks"] + report["subtasks"]}


HUB = {
    ("cais/mmlu", "mmlu"): None,
    ("allenai/ai2_arc", "ARC-Challenge"): ("arc_challenge", {"train": "train", "test": "test"}),
    ("allenai/ai2_arc", "ARC-Easy"): ("arc_easy", {"train": "train", "test": "test"}),
    ("Rowan/hellaswag", None): ("hellaswag", {"train": "train", "validation": "val"}),
    ("allenai/winogrande", "winogrande_xl"): ("winogrande", {"train": "train", "validation": "val"}),
}


def hub_dataset(files: dict[str, list[dict]]):
    """`load_dataset` for the ids that lm-eval names, with the columns and types of the Hub."""

    def load(path, name=None, **options):
        if path == "cais/mmlu":
            features = datasets.Features(
                {
                    "question": datasets.Value("string"),
                    "subject": datasets.Value("string"),
                    "choices": datasets.List(datasets.Value("string")),
                    "answer": datasets.ClassLabel(names=["A", "B", "C", "D"]),
                }
            )
            splits = {
                split: [row for row in files[f"mmlu_{split}"] if row["subject"] == name] for split in ("test", "dev")
            }
            return datasets.DatasetDict(
                {split: datasets.Dataset.from_list(part, features=features) for split, part in splits.items()}
            )
        task, splits = HUB[path, name]
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(files[f"{task}_{part}"]) for split, part in splits.items()}
        )

    return load


BENCHMARKS = ["mmlu", "arc_challenge", "arc_easy", "hellaswag", "winogrande"]


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_prompts_are_those_of_the_hub(tmp_path, monkeypatch, data, rows, num_fewshot):
    """Every request of every task, answer and metric, from local files and from lm-eval's own untouched task."""
    local = stage(tmp_path, BENCHMARKS, data, [], 1.0, num_fewshot).loaded["tasks"]
    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", hub_dataset(rows))
    hub = task_manager().load(BENCHMARKS)["tasks"]
    assert local.keys() == hub.keys() and len(hub) == 57 + 4
    compared = 0
    for name, task in hub.items():
        task.set_config("num_fewshot", num_fewshot)
        task.set_fewshot_seed(1234)
        for each in (task, local[name]):
            each.build_all_requests(rank=0, world_size=1)
        requests = [[(request.doc_id, request.args) for request in each.instances] for each in (task, local[name])]
        assert requests[0] == requests[1]
        targets = [[each.doc_to_target(doc) for doc in each.eval_docs] for each in (task, local[name])]
        assert targets[0] == targets[1]
        assert task.config.metric_list == local[name].config.metric_list
        compared += len(requests[0])
    assert compared > 57 * 4 + 4 * 12
    if num_fewshot == 0:
        first, task = next(row for row in rows["mmlu_test"] if row["subject"] == "anatomy"), local["mmlu_anatomy"]
        choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", first["choices"]))
        heading = "The following are multiple choice questions (with answers) about anatomy.\n\n"
        prompt = f"{heading}{first['question'].strip()}{choices}\nAnswer:"
        assert task.fewshot_context(task.eval_docs[0], 0) == prompt
        first, task = rows["hellaswag_val"][0], local["hellaswag"]
        context = f"{first['activity_label']}: {first['ctx_a']} {first['ctx_b'].capitalize()}"
        assert task.fewshot_context(task.eval_docs[0], 0) == context


def test_hellaswag_without_labels_says_so(tmp_path, data, rows):
    folder = tmp_path / "data"
    folder.mkdir()
    names = ("ind", "ctx", "endings", "label")
    write(folder / "hellaswag_val_1000.parquet", [{name: row[name] for name in names} for row in rows["hellaswag_val"]])
    (tmp_path / "staged").mkdir()
    staged = stage(tmp_path / "staged", ["hellaswag"], folder, [], 1.0, 0)
    task = staged.loaded["tasks"]["hellaswag"]
    assert task.fewshot_context(task.eval_docs[0], 0) == rows["hellaswag_val"][0]["ctx"]
    assert "no activity labels" in staged.notes["hellaswag"]


@pytest.fixture(scope="module")
def report(tmp_path_factory, llama_folder, data, rows):
    """The tiny Llama on everything, one prompt at a time."""
    output = tmp_path_factory.mktemp("report") / "new" / "folder"
    return evaluate(llama_folder, output, "--data-dir", data, "--held-out-text", data / "held_out.parquet",
                    "--batch-size", 1, "--stride", 40)  # fmt: skip


def test_batch_size_changes_nothing(tmp_path, llama_folder, our_folder, data, report):
    options = ("--data-dir", data, "--held-out-text", data / "held_out.parquet", "--stride", 40)
    few = ("--tasks", "arc_challenge", "hellaswag", "winogrande", "wikitext")
    ours = evaluate(our_folder, tmp_path / "one", *options, *few, "--batch-size", 1)
    for folder, single, tasks in ((llama_folder, report, ()), (our_folder, ours, few)):
        many = evaluate(folder, tmp_path / "many", *options, *tasks, "--batch-size", 16)
        assert scores(many) == scores(single)
        assert many["cut_prompts"] == single["cut_prompts"]
        for one, other in zip(single["perplexity"], many["perplexity"], strict=True):
            assert one["tokens"] == other["tokens"]
            assert math.isclose(one["nll_per_token"], other["nll_per_token"], rel_tol=1e-6)
    assert scores(ours).items() - scores(report).items(), "another model has other scores"


def test_mmlu_is_weighted_by_questions(report, rows):
    """Subjects have 2 to 4 questions, so a mean over subjects would be another number."""
    found = scores(report)
    sizes = {subject: sum(row["subject"] == subject for row in rows["mmlu_test"]) for subject in SUBJECTS}
    correct = {subject: found[f"mmlu_{subject}", "acc"] * size for subject, size in sizes.items()}
    questions = sum(sizes.values())
    assert math.isclose(found["mmlu", "acc"], sum(correct.values()) / questions)
    plain = sum(found[f"mmlu_{subject}", "acc"] for subject in SUBJECTS) / len(SUBJECTS)
    assert abs(found["mmlu", "acc"] - plain) > 1e-3
    group = task_manager().task_index["mmlu_stem_tasks"].tags
    stem = [subject for subject in SUBJECTS if f"mmlu_{subject}" in group]
    expected = sum(correct[subject] for subject in stem) / sum(sizes[subject] for subject in stem)
    assert math.isclose(found["mmlu_stem", "acc"], expected)
    row = next(row for row in report["tasks"] if row["task"] == "mmlu")
    assert row["n"] == questions and row["random"] == 0.25 and len(report["subtasks"]) == 4 + 57
    assert sum(row["n"] for row in report["subtasks"]) == 2 * questions


def test_report_is_complete(report, rows):
    names = {(row["task"], row["metric"]) for row in report["tasks"]}
    normed = {(task, metric) for task in ("hellaswag", "arc_challenge", "arc_easy") for metric in ("acc", "acc_norm")}
    assert names == {("mmlu", "acc"), ("winogrande", "acc")} | normed
    for row in report["tasks"]:
        assert 0 <= row["value"] <= 1 and 0 <= row["stderr"] < 0.3
        assert row["num_fewshot"] == 0 and row["dataset"].endswith(".parquet") and row["note"] == ""
    # Local files stand in for these; the card's metadata names them.
    hub = {"mmlu": "cais/mmlu", "hellaswag": "Rowan/hellaswag", "winogrande": "allenai/winogrande"}
    hub |= dict.fromkeys(("arc_challenge", "arc_easy"), "allenai/ai2_arc")
    assert {row["task"]: row["hub_dataset"] for row in report["tasks"]} == hub
    assert {row["hub_dataset"] for row in report["subtasks"]} == {"cais/mmlu"}
    arc = next(row for row in report["tasks"] if row["task"] == "arc_easy")
    shares = [1 / len(row["choices"]["text"]) for row in rows["arc_easy_test"]]
    assert math.isclose(arc["random"], sum(shares) / len(shares)) and arc["random"] != 0.25
    assert report["harness"] == {"name": "lm-eval", "version": version("lm-eval")} and report["dtype"] == "float32"
    assert [row["corpus"].split("/")[-1] for row in report["perplexity"]] == ["wikitext", "held_out.parquet"]
    assert [row["documents"] for row in report["perplexity"]] == [5, 12]
    assert "<unk>" in report["perplexity"][0]["note"] and report["left_out"] == []


def windows_by_hand(model, ids: list[int], prefix: int, stride: int) -> float:
    """Negative log-likelihood of a document, one window at a time and without padding."""
    row = [prefix, *ids]
    total, end, scored = 0.0, min(CONTEXT, len(ids)), 0
    while scored < len(ids):
        inputs = torch.tensor([row[max(0, end - CONTEXT) : end]])
        with torch.no_grad():
            log_probabilities = model(input_ids=inputs).logits[0].log_softmax(-1)
        for position in range(scored, end):  # token `position` is predicted at row index `position`
            total -= float(log_probabilities[position - end, ids[position]])
        scored, end = end, min(end + stride, len(ids))
    return total


@pytest.mark.parametrize("stride", [CONTEXT, 40, 1])
def test_perplexity_of_windows(tmp_path, llama_folder, stride):
    generator = random.Random(3)
    texts = [phrase(generator, length, length) for length in (2, 30, 90, 91, 200)]
    texts.append("stone " * 200)  # its windows are equal but for where the scored part begins
    if stride == 1:
        texts = texts[:4]
    write(tmp_path / "text.parquet", [{"text": text} for text in texts])
    report = evaluate(llama_folder, tmp_path / "out", "--tasks", "--held-out-text", tmp_path / "text.parquet",
                      "--stride", stride)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    harness = HarnessModel(model, AutoTokenizer.from_pretrained(llama_folder), 1, None)
    ids = [harness.tok_encode(text) for text in texts]
    assert max(map(len, ids)) > CONTEXT
    nll = [windows_by_hand(model, document, harness.prefix_token_id, stride) for document in ids]
    (row,) = report["perplexity"]
    assert report["tasks"] == [] and row["stride"] == stride and row["context"] == CONTEXT
    assert row["tokens"] == sum(map(len, ids)) and row["bytes"] == sum(len(text.encode()) for text in texts)
    assert math.isclose(row["nll_per_token"], sum(nll) / row["tokens"], rel_tol=1e-5)
    assert math.isclose(row["perplexity"], math.exp(row["nll_per_token"]))
    assert math.isclose(row["bits_per_byte"], sum(nll) / math.log(2) / row["bytes"], rel_tol=1e-5)
    if stride == CONTEXT:  # lm-eval's own windows
        requests = [SimpleNamespace(args=(text,)) for text in texts]
        theirs = super(type(harness), harness).loglikelihood_rolling(requests)
        assert all(math.isclose(-mine, other, rel_tol=1e-5) for mine, other in zip(nll, theirs))


def test_uniform_model_has_the_perplexity_of_guessing(tmp_path, data, rows):
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    folder = save_model(tmp_path / "uniform", model)
    report = evaluate(folder, tmp_path / "out", "--tasks", "wikitext", "--data-dir", data)
    (row,) = report["perplexity"]
    assert math.isclose(row["perplexity"], VOCABULARY, rel_tol=1e-5) and row["stderr"] < 1e-6
    assert math.isclose(row["nll_per_token"], row["random"], rel_tol=1e-6)
    pages = (data / "wikitext2" / "test.txt").read_text()
    # As lm-eval counts: bytes of the file before it is detokenized; the blank line before the first heading is no page.
    assert row["bytes"] == len(pages.encode()) - 2
    assert math.isclose(row["bits_per_byte"], row["tokens"] * math.log2(VOCABULARY) / row["bytes"], rel_tol=1e-5)


def test_random_model_scores_chance(tmp_path, llama_folder):
    """Answers are drawn at random, so any model that was not trained guesses; equal logits would not do, they tie."""
    make_data(tmp_path / "data", seed=7, count=171, per_subject=lambda number: 3)
    report = evaluate(llama_folder, tmp_path / "out", "--data-dir", tmp_path / "data", "--tasks", *BENCHMARKS)
    assert len(report["tasks"]) == 8
    for row in report["tasks"]:
        assert row["n"] == 171 and 0.03 < row["stderr"] < 0.045
        assert abs(row["value"] - row["random"]) < 3 * row["stderr"], row  # one of eight may well be beyond two
    deviations = [(row["value"] - row["random"]) / row["stderr"] for row in report["tasks"] if row["metric"] == "acc"]
    assert abs(sum(deviations)) < 2 * math.sqrt(len(deviations)), "together they lean to one side"


def test_contamination(tmp_path, our_folder, data, rows):
    records = [
        {"name": "allenai/ai2_arc", "configuration": "ARC-Challenge", "split": "train", "weight": 0.6, "rows": 1119},
        {"name": "cais/mmlu", "configuration": "auxiliary_train", "split": "train", "weight": 0.2, "rows": 99842},
        {"name": "data/search_corpus.jsonl", "split": "train", "weight": 0.2, "rows": 5},
    ]
    folder = tmp_path / "tuned"
    folder.symlink_to(our_folder)
    path = our_folder / "sft_data.json"
    path.write_text(json.dumps(records))
    try:
        report = evaluate(folder, tmp_path / "out", "--data-dir", data, "--limit", 2,
                          "--tasks", *BENCHMARKS[1:])  # fmt: skip
    finally:
        path.unlink()
    assert report["limit"] == 2
    notes = {row["task"]: row["note"] for row in report["tasks"]}
    assert "fine-tuned on allenai/ai2_arc ARC-Challenge (train, 1119 rows)" in notes["arc_challenge"]
    sources = [{**record, "source": record["name"]} for record in records]
    assert "fine-tuned on cais/mmlu (train, 99842 rows)" in contamination("mmlu", sources)
    for task in ("arc_easy", "hellaswag", "winogrande"):
        assert notes[task] == "only the first 2 documents of each task"
    page = (tmp_path / "out" / "evaluation.md").read_text()
    assert "fine-tuned on allenai/ai2_arc" in page and "| arc_challenge, acc |" in page


def test_files_are_found_in_folders_that_are_links(tmp_path):
    real, data = tmp_path / "elsewhere" / "wikitext2", tmp_path / "data"
    real.mkdir(parents=True), data.mkdir()
    (real / "test.txt.gz").touch()
    (data / "wikitext2").symlink_to(real)
    assert find_file(data, "wikitext", "test") == data / "wikitext2" / "test.txt.gz"
    (data / "again").symlink_to(data)  # and so on, without an end
    assert find_file(data, "wikitext", "test").resolve() == real / "test.txt.gz"
    (data / "wikitext3").mkdir()
    (data / "wikitext3" / "test.txt").touch()
    with pytest.raises(InputError, match="more than one test file"):
        find_file(data, "wikitext", "test")


def bad_inputs():
    def parquet(name, rows):
        return lambda folder: write(folder / f"{name}.parquet", rows)

    def text(name, content):
        return lambda folder: (folder / name).write_text(content)

    generator = random.Random(0)
    wrong = [{"question": "?", "answer": 1}]
    subjects = mmlu_rows(generator, lambda number: int(number > 3))
    unanswerable = [{**arc_rows(generator, 1)[0], "answerKey": "Z"}]
    empty = pyarrow.Table.from_pylist(arc_rows(generator, 1)).slice(0, 0)
    yield "no folder", None, ["--data-dir", "nowhere"], "'nowhere' is not a folder"
    yield "no files", None, [], "no file of any benchmark"
    yield "nothing", None, ["no data"], "nothing to evaluate"
    yield "no file", None, ["--tasks", "winogrande"], "no file for winogrande"
    yield "not parquet", text("arc_easy_test.parquet", "text"), [], "not a readable parquet file"
    yield "no rows", lambda f: pyarrow.parquet.write_table(empty, f / "arc_easy_test.parquet"), [], "holds no rows"
    yield "columns", parquet("arc_easy_test", wrong), [], "no column choices, answerKey among question, answer"
    yield "answer", parquet("arc_easy_test", unanswerable), [], "in row 0 the answer is not one of the choices"
    yield "subjects", parquet("mmlu_test", subjects), [], "must hold MMLU's 57 subjects"
    yield (
        "examples",
        parquet("arc_easy_test", arc_rows(generator, 3)),
        ["--num-fewshot", "2"],
        "arc_easy_train*.parquet",
    )
    yield "empty text", text("a.jsonl", ""), ["--tasks", "--held-out-text", "a.jsonl"], "is empty"
    yield "no text", text("a.jsonl", '{"body": "x"}\n'), ["--tasks", "--held-out-text", "a.jsonl"], "no column 'text'"
    yield (
        "stride",
        text("a.txt", "x"),
        ["--tasks", "--held-out-text", "a.txt", "--stride", "97"],
        "more than the model's",
    )
    yield "device", text("a.txt", "x"), ["--tasks", "--held-out-text", "a.txt", "--device", "abacus"], "'abacus' cannot"
    yield "no network", None, ["hub"], "cannot be read"


@pytest.mark.parametrize(
    "make, options, message", [case[1:] for case in bad_inputs()], ids=[c[0] for c in bad_inputs()]
)
def test_bad_data_is_one_sentence(tmp_path, monkeypatch, llama_folder, make, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    if make:
        make(tmp_path if "--held-out-text" in options else tmp_path / "data")
    without_files = {"hub": ["--tasks", "arc_easy"], "no data": ["--tasks"]}
    options = without_files.get(options[0] if options else "") or ["--data-dir", "data", *options]
    with pytest.raises(InputError) as caught:
        evaluate(llama_folder, tmp_path / "out", *options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_evaluation_of_nothing_ends_before_the_model_is_loaded(tmp_path):
    with pytest.raises(InputError, match="There is nothing to evaluate"):
        evaluate(tmp_path / "no model", tmp_path / "out", "--tasks")


def test_bad_models_are_one_sentence(tmp_path, llama_folder, data, rows):
    def refused(folder, message, *options):
        with pytest.raises(InputError) as caught:
            evaluate(folder, tmp_path / "out", "--data-dir", data, *options)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is not a causal language model")
    refused(tmp_path / "missing", "is not a causal language model")
    llama().save_pretrained(tmp_path / "speechless")
    refused(tmp_path / "speechless", "has no tokenizer")
    model = llama()
    model.resize_token_embeddings(200)
    refused(save_model(tmp_path / "small", model), "but the model only 200")
    model = llama()
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    broken = save_model(tmp_path / "broken", model)
    refused(broken, "no numbers", "--tasks", "arc_easy")
    for content in ("", "{}", '[{"weight": 1}]'):
        (broken / "sft_data.json").write_text(content)
        refused(broken, "is not a list of sources", "--tasks", "arc_easy")


@pytest.mark.parametrize("option, value", [("--tasks", "alchemy"), ("--limit", "0"), ("--num-fewshot", "few")])
def test_bad_options(capsys, llama_folder, option, value):
    with pytest.raises(SystemExit) as caught:
        evaluate(llama_folder, llama_folder, option, value)
    assert caught.value.code == 2 and f"'{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("fraction", [-1, 0, 2, math.nan])
def test_a_share_that_is_none_is_refused(tmp_path, monkeypatch, llama_folder, fraction):
    monkeypatch.setattr(script, "load_harness", lambda *arguments, **options: pytest.fail("the work began"))
    with pytest.raises(InputError, match="above 0 and at most 1"):
        evaluate(llama_folder, tmp_path / "out", "--held-out-text", "embedded", f"--held-out-fraction={fraction}")


def test_text_without_spaces_has_no_perplexity_per_word(tmp_path, llama_folder):
    """The number of one word of thousands of characters is larger than a float; every other score stands."""
    write(tmp_path / "text.parquet", [{"text": "石头和水都是自然的东西" * 60}, {"text": "two words"}])
    report = evaluate(llama_folder, tmp_path / "out", "--tasks", "--held-out-text", tmp_path / "text.parquet")
    (row,) = report["perplexity"]
    assert row["word_perplexity"] is None and row["nll_per_token"] * row["tokens"] > 710
    assert f"| {row['bits_per_byte']:.4f} |  |" in (tmp_path / "out" / "evaluation.md").read_text()
    write(tmp_path / "text.parquet", [{"text": "two words"}, {"text": "three  words more"}])
    report = evaluate(llama_folder, tmp_path / "out", "--tasks", "--held-out-text", tmp_path / "text.parquet")
    (row,) = report["perplexity"]
    assert math.isclose(row["word_perplexity"], math.exp(row["nll_per_token"] * row["tokens"] / 5))


@pytest.mark.parametrize("most", [2, 3])
def test_the_report_says_where_text_was_cut(tmp_path, monkeypatch, llama_folder, most):
    """What the card's metadata then does not take for a result of the whole dataset."""
    monkeypatch.setattr(task_data, "HELD_OUT_DOCUMENTS", most)
    write(tmp_path / "text.parquet", [{"text": text} for text in ("one stone", "two", "a third")])
    report = evaluate(llama_folder, tmp_path / "out", "--tasks", "--held-out-text", tmp_path / "text.parquet")
    (row,) = report["perplexity"]
    assert row["documents"] == most
    assert row["note"] == ("only the first 2 documents of the text" if most == 2 else "")


def test_the_output_folder_is_checked_first(tmp_path, monkeypatch, llama_folder):
    monkeypatch.setattr(script, "load_harness", lambda *arguments, **options: pytest.fail("the work began"))
    (tmp_path / "file").touch()
    for output, sentence in ((tmp_path / "file", "is a file"), (Path("/proc/out"), "cannot be written")):
        with pytest.raises(InputError, match=sentence):
            evaluate(llama_folder, output)


def test_failure_leaves_the_old_results(tmp_path, monkeypatch, llama_folder, data, rows):
    options = (llama_folder, tmp_path / "out", "--data-dir", data, "--tasks", "winogrande")
    evaluate(*options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert sorted(before) == ["evaluation.json", "evaluation.md", "evaluation.png"]

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("complexity_deep.workflow.evaluation.evaluation_report.render_markdown", full)
    with pytest.raises(OSError, match="no space"):
        evaluate(*options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_command_line(llama_folder, data, rows):
    """The script as a person starts it, from another folder, where its own name must not hide the library."""
    command = [sys.executable, str(REPOSITORY / "scripts" / "evaluate.py"), str(llama_folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    options = {"capture_output": True, "text": True, "cwd": data, "env": environment}
    run = subprocess.run([*command, "--data-dir", ".", "--tasks", "arc_easy", "wikitext"], **options)
    assert run.returncode == 0, run.stderr
    assert "| arc_easy, acc_norm |" in run.stdout and "Running loglikelihood requests" in run.stderr
    for step in ("loading ", "reading the tasks ...", "making the prompts of 2 tasks ..."):
        assert step in run.stderr, "a person sees what takes so long"
    assert json.loads((llama_folder / "evaluation" / "evaluation.json").read_text())["tasks"]
    assert (llama_folder / "evaluation" / "evaluation.png").stat().st_size > 5000


# Runs when a command's process ends.
LIBRARY_CHECK = """
import atexit

def check():
    import sys
    from complexity_deep.workflow.evaluation.perplexity import perplexity_scores
    assert sys.path[0].endswith("scripts") and "evaluate" not in sys.modules
    import evaluate
    metric = evaluate.load(METRIC, keep_in_memory=True)
    values = {"nll": [2.0, 4.0, 1.0], "tokens": [1, 1, 3], "total_bytes": 9}
    assert metric.compute(**values) == perplexity_scores(**values)
    print(metric.compute(nll=[2.0, 4.0], tokens=[1, 1])["nll_per_token"])

atexit.register(check)
"""


def test_the_library_of_the_same_name_is_found_and_computes_the_same(tmp_path):
    """While scripts/evaluate.py runs, `import evaluate` is the library, although the script's folder is first."""
    metric = str(REPOSITORY / "metrics" / "token_perplexity")
    (tmp_path / "sitecustomize.py").write_text(f"METRIC = {metric!r}\n{LIBRARY_CHECK}")
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path[1:]]),
    }
    command = [sys.executable, str(REPOSITORY / "scripts" / "evaluate.py"), "--help"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0 and "--held-out-text" in run.stdout, run.stderr
    assert run.stdout.split()[-1] == "3.0", run.stderr


def test_metric():
    nll, tokens = [30.0, 10.0, 50.0], [10, 5, 20]
    result = perplexity_scores(nll, tokens, total_bytes=100)
    mean = 90 / 35
    assert math.isclose(result["nll_per_token"], mean) and math.isclose(result["perplexity"], math.exp(mean))
    assert math.isclose(result["bits_per_byte"], 90 / math.log(2) / 100)
    # The error of the ratio agrees with that of documents drawn again and again.
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 50, (200,), generator=generator).double()
    nll = tokens * (3 + 0.5 * torch.randn(200, generator=generator).double())
    draws = torch.randint(0, 200, (4000, 200), generator=generator)
    spread = (nll[draws].sum(1) / tokens[draws].sum(1)).std()
    stderr = perplexity_scores(nll.tolist(), tokens.long().tolist())["stderr"]
    assert math.isclose(stderr, spread, rel_tol=0.05)
    assert perplexity_scores([1.0], [1])["stderr"] is None


def test_trainer_uses_the_metric(tmp_path):
    """Rows of different lengths in padded batches, with ignored labels; token losses give what logits give."""
    model = llama().eval()
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in (7, 20, 3, 12, 16):
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.3, -100, ids)
        examples.append({"input_ids": ids, "labels": labels})

    def collate(batch):
        def pad(name, value):
            return torch.nn.utils.rnn.pad_sequence([row[name] for row in batch], True, padding_value=value)

        return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}

    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to="none", use_cpu=True),
        eval_dataset=examples,
        data_collator=collate,
        compute_metrics=perplexity_metrics,
        preprocess_logits_for_metrics=token_nll,
    )
    metrics = trainer.evaluate()
    total = count = 0
    for row in examples:
        with torch.no_grad():
            log_probabilities = model(input_ids=row["input_ids"][None]).logits[0].log_softmax(-1)
        for position in range(1, len(row["labels"])):
            if row["labels"][position] != -100:
                total -= float(log_probabilities[position - 1, row["labels"][position]])
                count += 1
    assert math.isclose(metrics["eval_nll_per_token"], total / count, rel_tol=1e-5)
    assert math.isclose(metrics["eval_perplexity"], math.exp(total / count), rel_tol=1e-4)
    batch = collate(examples)
    logits = model(input_ids=batch["input_ids"]).logits
    nll = token_nll((logits, "something else"), batch["labels"])
    assert nll.shape == batch["labels"].shape
    torch.testing.assert_close(token_nll(nll[:, 1:], batch["labels"]), nll)
