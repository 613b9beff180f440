"""The model card of a run, from the files that the commands wrote; hub_card/model_card.md has its words.

    training_summary.json, trainer_state.json, loss_curve.png, expert_loads.png    pretrain.py and sft.py
    sft_data.json                                                                  sft.py
    evaluation/evaluation.json and .png                                            evaluate.py
    analysis/analysis.json and its .png files                                      analyze.py

Every number of the card is read from one of them, from the model's config or from its weights. What a run has no file
for is left out.
"""

import datetime
import importlib.metadata
import json
import platform
import re
import shutil
from pathlib import Path

import torch
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from complexity_deep.workflow.flops import parameter_counts
from complexity_deep.workflow.provenance import REPOSITORY
from complexity_deep.workflow.publishing.card_tables import (
    architecture_rows,
    hyperparameter_rows,
    loss_rows,
    notes,
    perplexity_rows,
    procedure_rows,
    quantizer,
    source_rows,
    task_rows,
)
from complexity_deep.workflow.publishing.hub_results import eval_results, write_eval_results
from complexity_deep.workflow.publishing.run_reports import Run

TEMPLATE = REPOSITORY / "hub_card" / "model_card.md"
NOT_SUPPORTED = REPOSITORY / "hub_card" / "not_supported.yaml"
PACKAGE = "complexity-deep-transformers"


def copy_figures(run: Run, folder: Path) -> dict[str, dict[str, str]]:
    """Copy the run's pictures into figures/; returns path -> title and caption, in reading order."""
    known = {
        "loss_curve.png": {"title": "Training and held-out loss"},
        "expert_loads.png": {"title": "Tokens per expert and layer, on held-out text"},
        "evaluation/evaluation.png": {"title": "Scores beside guessing"},
        "evaluation/long_context.png": {"title": "Perplexity by position, beyond the trained length"},
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
    """What does not work, without the layouts that do not load: a card is about one checkpoint, which loads."""
    points = yaml.safe_load(NOT_SUPPORTED.read_text(encoding="utf-8"))
    return [point["text"] for point in points if point["on_cards"]]


def requirements(config: PreTrainedConfig) -> dict[str, str]:
    """Versions that our package allows, of the libraries that a model with its own code needs; and its quantizer."""
    lines = [line.replace(" ", "") for line in importlib.metadata.requires(PACKAGE)]
    found = (re.fullmatch(r"(torch|transformers)([<>=~!].*)", line) for line in lines)
    needed = {match[1]: ",".join(sorted(match[2].split(","), reverse=True)) for match in found if match}  # >= before <
    method = quantizer(config)
    return needed | ({method: ""} if method in ("torchao", "bitsandbytes") else {})  # packages of the same name


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
        requirements=requirements(model.config) if is_ours else {},
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
        row_length=summary.get("row_length"),
        held_out=loss_rows(run),
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
