"""The model card of a run, from the files that the other scripts wrote; hub_card/model_card.md has its words.

    training_summary.json, trainer_state.json, loss_curve.png, expert_loads.png    pretrain.py and sft.py
    sft_data.json                                                                  sft.py
    evaluation/evaluation.json and .png                                            evaluate.py
    analysis/analysis.json and its .png files                                      analyze.py

Every number of the card is read from one of them, from the model's config or from its weights. What a run has no file
for is left out.
"""

import datetime
import html
import importlib.metadata
import json
import platform
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
import yaml
from command_line import InputError
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from perplexity_metric import held_out
from text_sources import BUILDERS
from training_report import as_text
from transformers import PreTrainedModel

REPOSITORY = Path(__file__).resolve().parents[1]
TEMPLATE = REPOSITORY / "hub_card" / "model_card.md"
NOT_SUPPORTED = REPOSITORY / "hub_card" / "not_supported.yaml"
LIMITED = "only the first"  # what evaluate.py notes of a result with --limit
PACKAGE = "complexity-deep-transformers"

# Report file -> what it must hold; the rest of it may be absent.
REPORTS = {
    "training_summary.json": ("held_out", "options"),
    "trainer_state.json": ("global_step", "log_history"),
    "sft_data.json": (),
    "evaluation/evaluation.json": ("harness", "tasks", "perplexity"),
    "analysis/analysis.json": ("verdict", "figures"),
}
SHAPE = {
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key and value heads",
    "max_position_embeddings": "context (tokens)",
    "sliding_window": "attention window (tokens)",
    "vocab_size": "vocabulary",
    "hidden_act": "activation",
    "tie_word_embeddings": "tied embeddings",
}
HYPERPARAMETERS = {
    "optim": "optimizer",
    "learning_rate": "learning rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warm-up",
    "weight_decay": "weight decay",
    "adam_beta1": "beta 1",
    "adam_beta2": "beta 2",
    "adam_epsilon": "epsilon",
    "max_grad_norm": "gradient clipping",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "rows per device",
    "gradient_accumulation_steps": "gradient accumulation",
    "max_length": "longest row (tokens)",
    "packing": "packing",
    "mask_across_documents": "documents of a row masked from each other",
    "scaled_residual_init": "scaled residual initialisation",
    "z_loss": "z-loss",
    "lora_r": "LoRA rank",
    "lora_alpha": "LoRA alpha",
    "lora_dropout": "LoRA dropout",
    "lora_target_modules": "LoRA modules",
    "lora_target_parameters": "LoRA parameters",
    "bf16": "bf16 autocast",
    "fp16": "fp16 autocast",
    "seed": "seed",
}
# Rows of training_summary.json that stand elsewhere on the card, or concern nobody but the person who ran it.
NOT_PROCEDURE = {"model_type", "parameters", "active_parameters", "text", "held_out", "options", "conversations"}
RENAMED = {"mfu": "model FLOPs utilisation", "peak_memory_gib": "peak GPU memory (GiB)", "date": "finished"}
RENAMED |= {"processes": "devices", "commit": "commit of the training code"}
NOT_PROCEDURE |= {"fine_tuned_from", "data_wait_share", "documents_read_by_process_0", "triton"}


def read_report(folder: Path, name: str):
    """A report file as JSON, or None where the run has none."""
    path = folder / name
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' is not readable JSON ({error}): write it again, or remove it.") from error
    missing = [key for key in REPORTS[name] if key not in report]
    if not report or missing:
        raise InputError(f"'{path}' holds no {' and no '.join(missing) or 'results'}: write it again, or remove it.")
    return report


@dataclass
class Run:
    """What the files of a run say; `folder` has the reports, `weights` the model."""

    folder: Path
    weights: Path
    base_model: str | None = None  # Hub id that the person gave
    datasets: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.summary, self.state, self.sft_data, self.evaluation, self.analysis = (
            read_report(self.folder, name) or read_report(self.weights, name) for name in REPORTS
        )
        if self.evaluation and not (self.evaluation["tasks"] or self.evaluation["perplexity"]):
            raise InputError(
                f"'{self.folder / 'evaluation' / 'evaluation.json'}' holds no results: evaluate again, or remove it."
            )
        self.options = (self.summary or {}).get("options", {})
        base = self.base_model or self.options.get("model_name_or_path")
        self.base_name = base and Path(base).name  # the whole path is of no use to anybody else
        if not self.base_model and base and is_hub_id(base):
            self.base_model = base

    def find(self, name: str) -> Path | None:
        paths = [folder / name for folder in (self.folder, self.weights)]
        return next((path for path in paths if path.is_file()), None)


def is_hub_id(name: str) -> bool:
    """Whether a source or a model is owner/name on the Hub, and not a path of the machine it was trained on."""
    return (
        re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None
        and Path(name.removesuffix(".gz")).suffix not in BUILDERS
        and not Path(name.split("/")[0]).exists()
    )


def shown(value) -> str:
    """A value as a cell of a Markdown table."""
    text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else as_text(value)
    return html.escape(text, quote=False).replace("|", "\\|")


def number(value: float, digits: int, stderr: float | None = None) -> str:
    return f"{value:,.{digits}f}" + (f"&nbsp;±&nbsp;{stderr:.{digits}f}" if stderr is not None else "")


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """`total`, and where the model knows them `trained` (a gradient reaches them) and `active` (for one token)."""
    return model.parameter_counts() if hasattr(model, "parameter_counts") else {"total": model.num_parameters()}


def architecture_rows(model: PreTrainedModel) -> dict[str, str]:
    config = model.config
    labels = {
        "total": "parameters",
        "trained": "parameters that training changes",
        "active": "parameters active per token",
    }
    rows = {labels[name]: f"{count:,}" for name, count in parameter_counts(model).items()}
    rows |= {label: shown(value) for key, label in SHAPE.items() if (value := getattr(config, key, None)) is not None}
    if getattr(config, "is_routed", False):
        rows["experts x width, per layer"] = f"{config.num_experts} x {config.moe_intermediate_size:,}"
        rows["experts per token"] = str(config.num_experts_per_tok)
        rows["routing table"] = config.routing
        if config.shared_expert_intermediate_size:
            rows["shared expert width"] = f"{config.shared_expert_intermediate_size:,}"
    else:
        rows["MLP width"] = shown(config.intermediate_size)
    rows["dtype of the weights"] = str(model.dtype).removeprefix("torch.")
    return rows


def source_rows(run: Run) -> list[dict]:
    """Training text: `name`, `hub_id` where it is on the Hub, `share`, and of conversations `split` and `rows`."""
    if run.sft_data:
        rows = [dict(record) for record in run.sft_data]
    else:
        sources = run.options.get("sources") or []
        weights = run.options.get("source_weights") or [None] * len(sources)
        rows = [{"name": name, "weight": weight} for name, weight in zip(sources, weights)]
    total = sum(row["weight"] or 0 for row in rows)
    for row in rows:
        row["share"] = f"{number(100 * row['weight'] / total, 1)} %" if row["weight"] else "all of it"
        hub_id = row["name"].partition(":")[0]
        row["hub_id"] = hub_id if is_hub_id(hub_id) else None
        if row["hub_id"] is None:
            row["name"] = Path(row["name"]).name
    return rows


def procedure_rows(run: Run) -> dict[str, str]:
    rows = {
        RENAMED.get(name, name.replace("_", " ")): shown(value)
        for name, value in (run.summary or {}).items()
        if name not in NOT_PROCEDURE
    }
    if not rows and run.state:
        rows["steps"] = shown(run.state["global_step"])
    return rows


def hyperparameter_rows(run: Run) -> dict[str, str]:
    absent = {key for key, value in run.options.items() if value is None or value is False or value == []}
    if run.options.get("max_steps", -1) > 0:
        absent.add("num_train_epochs")  # Trainer takes no notice of it then
    if not run.options.get("use_peft"):
        absent |= {key for key in HYPERPARAMETERS if key.startswith("lora_")}
    rows = {
        label: shown(run.options[key])
        for key, label in HYPERPARAMETERS.items()
        if key in run.options and key not in absent
    }
    if warmup := run.options.get("warmup_steps"):  # Trainer takes a number below 1 for a share
        rows["warm-up"] = f"{number(100 * warmup, 1)} % of the steps" if warmup < 1 else f"{shown(warmup)} steps"
    return rows


def held_out_rows(run: Run) -> list[dict]:
    """Loss on held-out text before and after training."""
    entries = [entry for entry in (run.state or {}).get("log_history", []) if "eval_loss" in entry]
    ends = {entry["step"]: held_out(entry) for entry in [*entries[:1], *entries[-1:]]}
    return [
        {
            "step": shown(step),
            "loss": number(scores["loss"], 4, scores.get("loss_stderr")),
            "perplexity": number(scores["perplexity"], 2, scores.get("perplexity_stderr")),
        }
        for step, scores in ends.items()
    ]


def task_rows(run: Run) -> list[dict]:
    return [
        {
            "task": row["task"],
            "metric": row["metric"],
            "value": number(100 * row["value"], 1, row["stderr"] and 100 * row["stderr"]),
            "random": number(100 * row["random"], 1),
            "n": shown(row["n"]),
            "num_fewshot": shown(row["num_fewshot"]),
        }
        for row in (run.evaluation or {}).get("tasks", [])
    ]


def perplexity_rows(run: Run) -> list[dict]:
    return [
        {
            "corpus": Path(row["corpus"]).name if not is_hub_id(row["corpus"].partition(":")[0]) else row["corpus"],
            "perplexity": number(row["perplexity"], 2, row["stderr"] and row["stderr"] * row["perplexity"]),
            "nll": number(row["nll_per_token"], 4, row["stderr"]),
            "bits_per_byte": number(row["bits_per_byte"], 4),
            **{name: shown(row[name]) for name in ("tokens", "documents", "context", "stride")},
        }
        for row in (run.evaluation or {}).get("perplexity", [])
    ]


def notes(rows: list[dict]) -> dict[str, str]:
    """Each note, and what it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        if row.get("note"):
            about.setdefault(shown(row["note"]), []).append(shown(row.get("task") or Path(row["corpus"]).name))
    return {note: ", ".join(dict.fromkeys(names)) for note, names in about.items()}


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


def copy_figures(run: Run, folder: Path) -> dict[str, dict[str, str]]:
    """Copy the run's pictures into figures/; returns path -> title and caption, in reading order."""
    known = {
        "loss_curve.png": {"title": "Training and held-out loss"},
        "expert_loads.png": {"title": "Tokens per expert and layer, on held-out text"},
        "evaluation/evaluation.png": {"title": "Scores beside guessing"},
    }
    known |= {f"analysis/{name}": figure for name, figure in (run.analysis or {}).get("figures", {}).items()}
    figures = {}
    for name, figure in known.items():
        if path := run.find(name):
            (folder / "figures").mkdir(exist_ok=True)
            shutil.copyfile(path, folder / "figures" / path.name)
            figures[name] = {"path": f"figures/{path.name}", "caption": "", **figure}
    return figures


def not_supported() -> list[str]:
    """What does not run, but for the layouts of checkpoints: a card is about a single one."""
    points = yaml.safe_load(NOT_SUPPORTED.read_text(encoding="utf-8"))
    return [point["text"] for point in points if point["on_cards"]]


def requirements() -> dict[str, str]:
    """Versions that our package allows, of the libraries that a model with its own code needs."""
    lines = [line.replace(" ", "") for line in importlib.metadata.requires(PACKAGE)]
    found = (re.fullmatch(r"(torch|transformers)([<>=~!].*)", line) for line in lines)
    return {match[1]: ",".join(sorted(match[2].split(","), reverse=True)) for match in found if match}  # >= before <


def write_card(
    folder: Path,
    run: Run,
    model: PreTrainedModel,
    tokenizer,
    *,
    repo_id: str,
    revision: str,
    license: str,
    languages: list[str],
    is_published: bool,
) -> None:
    """Write README.md, its figures and .eval_results/ into a folder that holds the model already."""
    name = repo_id.rpartition("/")[2]
    sources = source_rows(run)
    datasets = list(dict.fromkeys([*run.datasets, *(row["hub_id"] for row in sources if row["hub_id"])]))
    has_chat = bool(run.sft_data and tokenizer.chat_template)
    results = eval_results(run)
    card_data = ModelCardData(
        language=languages,
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=run.base_model,
        datasets=datasets or None,
        tags=[model.config.model_type] + ["conversational"] * has_chat,
        model_name=name if results else None,
        eval_results=results or None,
    )
    summary = run.summary or {}
    custom_code = "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    is_ours = model.config.model_type == "complexity-deep"
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        revision=revision,
        owner=repo_id.partition("/")[0],
        year=(summary.get("date") or datetime.date.today().isoformat())[:4],
        config=model.config,
        parameters=parameter_counts(model),
        custom_code=custom_code,
        tokenizer_class=type(tokenizer).__name__,
        is_ours=is_ours,
        is_published=is_published,
        has_chat=has_chat,
        is_fine_tuned=bool(run.sft_data),
        base_name=run.base_name,
        architecture=architecture_rows(model),
        requirements=requirements() if is_ours else {},
        tested={
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        not_supported=not_supported(),
        software_version=importlib.metadata.version(PACKAGE),
        sources=sources,
        procedure=procedure_rows(run),
        hyperparameters=hyperparameter_rows(run),
        tokens=summary.get("tokens"),
        held_out=held_out_rows(run),
        evaluation=run.evaluation,
        tasks=task_rows(run),
        perplexity=perplexity_rows(run),
        notes=notes([*run.evaluation["tasks"], *run.evaluation["perplexity"]]) if run.evaluation else {},
        analysis=run.analysis,
        figures=copy_figures(run, folder),
    )
    card.save(folder / "README.md")
    if run.evaluation:
        write_eval_results(run, folder)
