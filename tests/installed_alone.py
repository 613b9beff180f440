"""Use the installed wheel where nothing but its base dependencies is. `make test-wheel` runs this.

A model is made, trained for a step, saved, and loaded again by the package and by remote code.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

import complexity_deep
from complexity_deep import ComplexityDeepConfig, ComplexityDeepForCausalLM

OPTIONAL = ("accelerate", "datasets", "evaluate", "trl", "peft", "lm_eval", "matplotlib", "scipy", "pandas", "sklearn")
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
assert "complexity_deep" not in sys.modules
torch.save(model.generate(torch.arange(3, 11)[None], max_new_tokens=5, do_sample=False), sys.argv[2])
"""


def main() -> None:
    assert "site-packages" in complexity_deep.__file__, f"not the wheel: {complexity_deep.__file__}"
    present = [name for name in OPTIONAL if find_spec(name)]
    assert not present, f"the environment is not empty: {present}"
    config = ComplexityDeepConfig(vocab_size=128, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    torch.manual_seed(0)
    model = ComplexityDeepForCausalLM(config)
    ids = torch.arange(3, 11)[None]
    model(ids, labels=ids).loss.backward()
    tokens = model.eval().generate(ids, max_new_tokens=5, do_sample=False)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = ComplexityDeepForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(model(ids).logits, again(ids).logits)
        answer = Path(folder, "tokens.pt")
        subprocess.run([sys.executable, "-c", LOAD, folder, answer], check=True, cwd=folder)
        assert torch.equal(torch.load(answer), tokens)
    versions = {
        name: importlib.metadata.version(name) for name in ("complexity-deep-transformers", "torch", "transformers")
    }
    print(f"The wheel works alone: {versions}, {len(list(importlib.metadata.distributions()))} packages installed.")


if __name__ == "__main__":
    main()
