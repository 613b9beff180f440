"""Loss by position, up to several times the length that a model was trained with, as it is and scaled by yarn.

The documents are long enough for every position, so that no curve changes because other documents go on. The first
token of each is given, and the loss of every other one is that of a single forward pass over the document.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from matplotlib.ticker import LogFormatter
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from complexity_deep.workflow.charts import subplots, write_figure
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.text_sources import is_held_out, load_sources, read_documents
from complexity_deep.workflow.saved_model import load_model

MOST_DOCUMENTS = 128
MOST_READ = 20_000  # documents in which long ones are looked for
POINTS = 8  # of a curve, for each trained length


def trained_length(path: str, config) -> int:
    """Tokens of the rows that the model was trained on, as pretrain.py recorded it or as the configuration says."""
    summary = Path(path, "training_summary.json")
    if summary.is_file():
        try:
            recorded = json.loads(summary.read_text()).get("row_length")
        except (ValueError, AttributeError) as error:
            raise InputError(f"'{summary}' is no summary as scripts/pretrain.py writes it ({error!r}).") from error
        if recorded:
            return int(recorded)
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("original_max_position_embeddings") or config.max_position_embeddings


def scaled_models(path: str, model: PreTrainedModel, length: int, factor: int, **options):
    """Yield (name, model): the model as it is, and scaled by yarn where its positions are not scaled already."""
    rope = getattr(model.config, "rope_parameters", None)
    if not rope or "rope_type" not in rope:
        raise InputError(
            f"'{path}' has no rotary positions of one kind that could be scaled: leave --context-factor out."
        )
    if rope["rope_type"] != "default":
        yield rope["rope_type"], model
        return
    yield "as trained", model
    yarn = {
        "rope_type": "yarn",
        "rope_theta": rope["rope_theta"],
        "factor": float(factor),
        "original_max_position_embeddings": length,
    }
    scaled = load_model(path, rope_parameters=yarn, max_position_embeddings=factor * length, **options)
    scaled.config.use_cache = False
    yield f"yarn, factor {factor}", scaled


def long_documents(source: str, fraction: float, tokenizer, tokens: int, most: int) -> torch.Tensor:
    """The first `tokens` ids of each document that has so many, [documents, tokens]; at most `most` documents."""
    held_out = (text for text in read_documents(load_sources([source])) if is_held_out(text, fraction))
    # A token stands for at least one byte, so that most short documents need no tokenizer.
    long = (text for text in itertools.islice(held_out, MOST_READ) if len(text.encode("utf-8", "replace")) >= tokens)
    ids = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in long)
    rows = list(itertools.islice((row[:tokens] for row in ids if len(row) >= tokens), most))
    if not rows:
        raise InputError(
            f"No document of '{source}' has {tokens:,} tokens: lower --context-factor, or name other text."
        )
    return torch.tensor(rows)


@torch.no_grad()
def losses_by_position(model: PreTrainedModel, rows: torch.Tensor, batch_size: int, progress: tqdm) -> np.ndarray:
    """Loss in nats of each token of `rows` [documents, tokens] but the first, [documents, tokens - 1]."""
    losses = []
    for batch in rows.split(batch_size) if len(rows) else ():
        batch = batch.to(model.device)
        logits = model(batch).logits
        losses += [  # a row at a time, so that only one is copied to fp32
            torch.nn.functional.cross_entropy(row[:-1].float(), ids[1:], reduction="none").cpu()
            for row, ids in zip(logits, batch)
        ]
        progress.update(len(batch))
    return torch.stack(losses).double().numpy() if losses else np.empty((0, rows.shape[1] - 1))


def curve(losses: np.ndarray, width: int) -> dict[str, list]:
    """Means [points] of `losses` [documents, positions] over `width` positions, and their errors over documents."""
    means = losses.reshape(len(losses), -1, width).mean(2)
    stderr = means.std(0, ddof=1) / math.sqrt(len(means)) if len(means) > 1 else np.full(means.shape[1], np.nan)
    return {"loss": means.mean(0).tolist(), "stderr": [None if math.isnan(error) else error for error in stderr]}


def measure_long_context(
    model: PreTrainedModel,
    tokenizer,
    state: PartialState,
    *,
    path: str,
    revision: str | None,
    dtype: str,
    texts: list[str],
    fraction: float,
    factor: int,
    batch_size: int,
    limit: int | None,
) -> list[dict]:
    """One entry for each source of held-out text; every process takes a share of its documents.

    `batch_size` is in rows of the trained length. Raises `InputError` for text without long documents, and for a model
    whose positions cannot be scaled.
    """
    length = trained_length(path, model.config)
    width = max(1, length // POINTS)
    # The first token has no loss. All others fall into whole points.
    positions = length * factor // width * width
    most = min(limit or MOST_DOCUMENTS, MOST_DOCUMENTS)
    rows = {source: long_documents(source, fraction, tokenizer, positions + 1, most) for source in texts}
    entries = [
        {
            "corpus": "/".join(Path(source).parts[-2:]),
            "trained_length": length,
            "factor": factor,
            "documents": len(documents),
            "position": [width * point + width / 2 for point in range(positions // width)],
            "curves": {},
        }
        for source, documents in rows.items()
    ]
    options = {"device": str(model.device), "revision": revision, "dtype": dtype}
    at_once = max(1, batch_size // factor)
    for name, scaled in scaled_models(path, model, length, factor, **options):
        total = sum(len(documents[state.process_index :: state.num_processes]) for documents in rows.values())
        progress = tqdm(total=total, desc=f"long documents, {name}", disable=not state.is_main_process)
        for entry, documents in zip(entries, rows.values()):
            own = documents[state.process_index :: state.num_processes]
            # Documents are put into the order that one process has, because a sum of floats depends on it.
            numbers = range(state.process_index, len(documents), state.num_processes)
            numbered = list(zip(numbers, losses_by_position(scaled, own, at_once, progress)))
            numbered = sorted(gather_object(numbered), key=lambda pair: pair[0])
            losses = np.stack([loss for _, loss in numbered])
            if not np.isfinite(losses).all():
                raise InputError(f"'{path}' gives losses that are no numbers ({name}); try --dtype float32.")
            entry["curves"][name] = curve(losses, width)
        progress.close()
    return entries


def by_length(entry: dict) -> list[list[str]]:
    """Cells of a table: a row for each trained length, its positions and the perplexity of every curve."""
    length, rows = entry["trained_length"], []
    for number in range(entry["factor"]):
        start, end = number * length, (number + 1) * length
        points = [point for point, at in enumerate(entry["position"]) if start <= at < end]
        means = [np.mean([curve["loss"][point] for point in points]) for curve in entry["curves"].values()]
        rows.append([f"{start:,} to {end - 1:,}", *(f"{math.exp(mean):,.2f}" for mean in means)])
    return rows


def draw_long_context(entries: list[dict], path: Path) -> None:
    """Perplexity over position, a panel for each source; a band is one standard error to both sides."""
    figure, all_axes = subplots(1, len(entries), figsize=(2 + 5 * len(entries), 4.2), squeeze=False)
    for axes, entry in zip(all_axes[0], entries):
        for name, points in entry["curves"].items():
            loss = np.array(points["loss"])
            error = np.array([error or 0.0 for error in points["stderr"]])
            (line,) = axes.plot(entry["position"], np.exp(loss), label=name)
            band = np.exp(loss - error), np.exp(loss + error)
            axes.fill_between(entry["position"], *band, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.axvline(entry["trained_length"], color="black", linestyle="dotted", label="trained length")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())  # 40 and not 4 x 10^1
        axes.yaxis.set_minor_formatter(LogFormatter())
        axes.set_xlabel("position")
        axes.set_ylabel("perplexity")
        axes.set_title(f"{entry['corpus']}, {entry['documents']} documents")
        axes.legend()
    write_figure(figure, path)
