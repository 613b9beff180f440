"""A model run through lm-eval's tasks; the scores, each with its standard error and the score of guessing."""

import math
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import lm_eval
import torch
from accelerate import PartialState
from accelerate.utils import gather
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from complexity_deep.workflow.command import InputError, say
from complexity_deep.workflow.evaluation.contamination import contamination
from complexity_deep.workflow.evaluation.perplexity import perplexity_scores
from complexity_deep.workflow.evaluation.task_data import StagedTasks
from complexity_deep.workflow.saved_model import load_model, load_tokenizer_of


class HarnessModel(HFLM):
    """lm-eval's model, with overlapping windows over long documents, and a count of the prompts that were cut.

    Where there are several processes, lm-eval gives each of them its share of the documents.
    """

    def __init__(self, model, tokenizer, batch_size: int, stride: int | None, state: PartialState | None = None):
        super().__init__(model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=torch.float32)
        self.stride = stride or self.max_length
        self.prompts = self.cut_prompts = 0
        self.state = state
        if state is not None:  # lm-eval looks for processes only where it loads the model itself
            self._rank, self._world_size = state.process_index, state.num_processes

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return gather(tensor) if self.world_size > 1 else tensor

    def barrier(self) -> None:
        if self.world_size > 1:
            self.state.wait_for_everyone()

    def counts(self) -> list[int]:
        """How many prompts there were, and how many were cut, over all processes."""
        own = torch.tensor([[self.prompts, self.cut_prompts]], device=self.device)
        return self.all_gather(own).sum(0).tolist()

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        own = distinct(requests)
        scores = dict(zip(map(id, own), super().loglikelihood(own, disable_tqdm or self.rank > 0)))
        return [scores[id(request)] for request in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        own = distinct(requests)
        scores = dict(zip(map(id, own), self._rolling_scores(own, disable_tqdm)))
        return [scores[id(request)] for request in requests]

    def _rolling_scores(self, requests, disable_tqdm: bool) -> list[float]:
        owners, windows = [], []
        for index, request in enumerate(requests):
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=self.max_length - self.stride + 1,
            ):
                owners.append(index)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for index, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)):
            totals[index] += score
        return totals

    def _loglikelihood_tokens(self, requests, **kwargs):
        longest = max(len(answer) for _, _, answer in requests)
        if longest > self.max_length:
            raise InputError(f"An answer of {longest} tokens does not fit the model's {self.max_length} positions.")
        # lm-eval computes equal inputs once. It takes no heed of where the answer begins in each, and repetitive text
        # has windows that are equal but for that.
        self.logits_cache = all(text is not None for text, _, _ in requests)
        self.prompts += sum(text is not None for text, _, _ in requests)
        self.cut_prompts += sum(len(prompt) + len(answer) > self.max_length + 1 for _, prompt, answer in requests)
        return super()._loglikelihood_tokens(requests, **kwargs)


def distinct(requests: list) -> list:
    """Each request once. lm-eval repeats the last one of a process that has fewer of them than another."""
    return list({id(request): request for request in requests}.values())


def load_harness(
    path: str,
    *,
    revision: str | None,
    dtype: str,
    device: str,
    batch_size: int,
    stride: int | None,
    state: PartialState | None = None,
) -> HarnessModel:
    """A folder or a model of the Hub, ready for lm-eval; `InputError` where it cannot be loaded or used.

    `state` says which of several processes this is.
    """
    model = load_model(path, device, revision=revision, dtype=dtype)
    tokenizer = load_tokenizer_of(model, path, revision=revision)
    model.config.use_cache = False  # nothing is generated
    harness = HarnessModel(model, tokenizer, batch_size, stride, state)
    if harness.stride > harness.max_length:
        raise InputError(f"--stride {stride} is more than the model's {harness.max_length} positions.")
    return harness


def leaves_of(task: str, children: dict[str, list[str]]) -> list[str]:
    """The tasks of a group, through its groups; a task itself."""
    return [leaf for child in children[task] for leaf in leaves_of(child, children)] if children.get(task) else [task]


def accuracy_rows(results: dict, task: str) -> list[dict]:
    """Scores of a task, or of a group such as MMLU, one row per metric."""
    leaves = leaves_of(task, results["group_subtasks"])
    samples = [sample for leaf in leaves for sample in results["samples"][leaf]]
    scores = results["results"][task]
    rows = []
    for metric in ("acc", "acc_norm"):
        if f"{metric},none" in scores:
            stderr = scores[f"{metric}_stderr,none"]  # a single question has none
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "value": scores[f"{metric},none"],
                    "stderr": None if isinstance(stderr, str) or math.isnan(stderr) else stderr,
                    # Guessing, with as many choices as each question has.
                    "random": sum(1 / len(sample["arguments"]) for sample in samples) / len(samples),
                    "n": len(samples),
                    "num_fewshot": results["n-shot"][leaves[0]],
                }
            )
    return rows


def perplexity_row(samples: list[dict], model: HarnessModel) -> dict:
    nll = [-sample["filtered_resps"][0] for sample in samples]
    tokens = [len(model.tok_encode(sample["arguments"][0][0])) for sample in samples]
    # lm-eval counts the bytes and words of WikiText before it is detokenized, and so do we.
    size = sum(sample["bits_per_byte"][1] for sample in samples)
    scores = perplexity_scores(nll, tokens, size)
    nll_per_word = sum(nll) / sum(sample["word_perplexity"][1] for sample in samples)
    return {
        **scores,
        "perplexity_stderr": scores["stderr"] and scores["stderr"] * scores["perplexity"],
        "word_perplexity": math.exp(nll_per_word) if nll_per_word < 100 else None,  # text without spaces is one word
        "random": math.log(model.config.get_text_config().vocab_size),  # nats per token of a uniform guess
        "tokens": sum(tokens),
        "bytes": size,
        "documents": len(samples),
        "context": model.max_length,
        "stride": model.stride,
    }


def run_tasks(
    model: HarnessModel, staged: StagedTasks, records: list[dict], *, path: str, revision: str | None, limit: int | None
) -> dict | None:
    """Run every staged task; returns the contents of evaluation.json, in the first of several processes.

    `records` are the sources that the model was fine-tuned on, and `limit` the documents to use of each task. Raises
    `InputError` for scores that are no numbers, and for a task that has not a document for each process.
    """
    for name, task in staged.loaded["tasks"].items():
        documents = min(limit or len(task.eval_docs), len(task.eval_docs))
        if documents < model.world_size:
            raise InputError(
                f"{staged.texts.get(name, name)} has {documents} documents, which is less than one for each of "
                f"{model.world_size} processes: launch fewer."
            )
    say(f"making the prompts of {len(staged.loaded['tasks'])} tasks")
    results = lm_eval.evaluate(model, staged.loaded, limit=limit)
    prompts, cut_prompts = model.counts()
    if results is None:
        return None
    for task, samples in results["samples"].items():
        samples.sort(key=lambda sample: sample["doc_id"])  # those of one process come after those of another
        answers = [answer for sample in samples for answer in sample["filtered_resps"]]
        if not all(math.isfinite(answer[0] if isinstance(answer, tuple) else answer) for answer in answers):
            raise InputError(f"'{path}' gives scores that are no numbers (in {task}); try --dtype float32.")
    limited = f"only the first {limit} documents of each task" if limit else ""

    def described(row: dict, task: str) -> dict:
        notes = filter(None, [staged.notes.get(task), contamination(task, records), limited])
        # Data that differs from the Hub's gives scores that are not of the Hub's dataset.
        hub_dataset = None if staged.notes.get(task) else staged.hub_datasets[task]
        dataset = staged.files[task].name if task in staged.files else hub_dataset
        return {**row, "dataset": dataset, "hub_dataset": hub_dataset, "note": "; ".join(notes)}

    tasks, subtasks, perplexity = [], [], []
    for task in staged.benchmarks:
        if task == "wikitext":
            row = {"corpus": "wikitext", **perplexity_row(results["samples"][task], model)}
            perplexity.append(described(row, task))
            continue
        tasks += [described(row, task) for row in accuracy_rows(results, task)]
        for name in results["group_subtasks"].get(task, []):
            for part in [name, *results["group_subtasks"].get(name, [])]:
                subtasks += [described(row, task) for row in accuracy_rows(results, part)]
    for task, source in staged.texts.items():
        row = perplexity_row(results["samples"][task], model)
        corpus = "/".join(Path(source).parts[-2:])  # not the whole path, which tells about the machine and its user
        perplexity.append({"corpus": corpus, **row, "dataset": corpus, "note": limited or staged.notes.get(task, "")})
    device = model.device.type
    return {
        "model": Path(path).resolve().name if Path(path).is_dir() else path,
        "revision": getattr(model.config, "_commit_hash", None) or revision,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "harness": {"name": "lm-eval", "version": version("lm-eval")},
        "versions": {name: version(name) for name in ("torch", "transformers", "datasets")},
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU x {torch.get_num_threads()}",
        "processes": model.world_size,
        "batch_size": model.batch_size,
        "limit": limit,
        "prompts": prompts,
        "cut_prompts": cut_prompts,
        "tasks": tasks,
        "subtasks": subtasks,
        "perplexity": perplexity,
        "left_out": staged.left_out,
    }
