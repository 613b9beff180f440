"""A process that does one thing for the first time, and prints how many seconds that took.

    python -m complexity_deep.workflow.benchmarks.first_call CONFIG_FOLDER "generate" | "training step"

Loading the libraries, the model's weights and CUDA itself are done before the clock starts.
"""

import sys
import time

import torch
from transformers import AutoConfig

from complexity_deep.workflow.benchmarks.model_speed import build, training_step, zipf_ids
from complexity_deep.workflow.benchmarks.user_paths import NEW_TOKENS, PROMPT


def main(folder: str, what: str) -> None:
    config = AutoConfig.from_pretrained(folder)
    model = build(config, "cuda", "sdpa")
    torch.cuda.synchronize()
    if what == "generate":
        model.eval()
        ids = zipf_ids(config.vocab_size, 1, PROMPT, device="cuda")
        call = lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS)  # noqa: E731
    else:
        step = training_step(model.train(), "cuda", "eager")
        ids = zipf_ids(config.vocab_size, 1, 2048, device="cuda")
        call = lambda: step(input_ids=ids, labels=ids)  # noqa: E731
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    print(time.perf_counter() - begin)


if __name__ == "__main__":
    main(*sys.argv[1:])
