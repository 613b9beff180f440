"""The report files that a run, its evaluation and its analysis left."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.sources import builder_of

# Report file -> what it must hold; the rest of it may be absent.
REPORTS = {
    "training_summary.json": ("held_out", "options"),
    "trainer_state.json": ("global_step", "log_history"),
    "sft_data.json": (),
    "evaluation/evaluation.json": ("harness", "tasks", "perplexity"),
    "analysis/analysis.json": ("verdict", "figures"),
}


def is_hub_id(name: str) -> bool:
    """Whether a source or a model is owner/name on the Hub, and not a path of the machine it was trained on."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and builder_of(name) is None and not Path(name.split("/")[0]).exists()


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
