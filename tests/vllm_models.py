"""Write the saved models that vllm_generation.py serves: `python tests/vllm_models.py FOLDER`, run by `make test-vllm`.

This needs the package and its extras. The folders that it writes do not.
"""

import sys
import tempfile
from pathlib import Path

import torch

from complexity_deep import ComplexityDeepForCausalLM
from support import run_command, tiny_model, tiny_tokenizer

# Heads are 32 wide, because vLLM has no kernel on the CPU for the 16 of configs/tiny.json and tests/golden.
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "eos_token_id": None,
}
MODELS = {
    "modulo": {},
    "exported-balanced-shared": {"routing": "balanced", "shared_expert_intermediate_size": 64},
    "published-converted": {},
    "table-per-layer": {"routing": "balanced", "routing_per_layer": True},
    "value-embeddings": {"value_embedding_layers": [0, 2]},
    "learned-mu-router-bounded-mu": {"mu_router_gradient": True, "use_mu_norm": True},
    "sliding-window": {"sliding_window": 8},
    "without-dynamics": {"use_dynamics": False, "use_qk_norm": False, "tie_word_embeddings": True},
    "dense": {"use_token_routed_mlp": False, "hidden_act": "gelu"},
}


@torch.no_grad()
def model_of(seed: int, **options) -> ComplexityDeepForCausalLM:
    """A random model whose greedy answers vary, and in which mu overrides the table's expert for many tokens."""
    model = tiny_model(std=0.1, seed=seed, **{**SHAPE, **options})
    for layer in model.model.layers:
        if model.config.is_routed:
            layer.mlp.mu_router.weight *= 5
    if model.config.routing == "balanced":
        ranks = torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(seed))
        model.balance_routing(10_000 // (1 + ranks))
    return model


def save(model: ComplexityDeepForCausalLM, folder: Path) -> None:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def main(root: Path) -> None:
    for seed, (name, options) in enumerate(MODELS.items()):
        model = model_of(seed, **options)
        with tempfile.TemporaryDirectory() as first:
            if name == "exported-balanced-shared":
                save(model, Path(first))
                names = "--repo-id", "somebody/model", "--license", "apache-2.0", "--language", "en"
                run_command("export_to_hub", first, *names, "--output-dir", root / name)
            elif name == "published-converted":
                model.save_published_format(first)
                save(ComplexityDeepForCausalLM.from_pretrained(first), root / name)
            else:
                save(model, root / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
