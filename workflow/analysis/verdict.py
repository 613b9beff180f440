"""The sentence that an analysis ends with: were the experts trained, and does the model rely on them?"""

import statistics

from complexity_deep.workflow.analysis.weights import NOISE_LIMIT


def give_verdict(analysis: dict) -> dict[str, str]:
    """`label`, one of TRAINED, PARTLY TRAINED, NOT TRAINED, FRESHLY INITIALISED and NO EXPERTS, and `text`."""
    checkpoint = analysis["checkpoint"]
    if "expert_noise_excess" not in checkpoint:
        text = "This is a dense configuration, without token-routed experts to ask about."
        return {"label": "NO EXPERTS", "text": text}

    losses = checkpoint["losses"]
    change = {name: losses[name] - losses["intact"] for name in ("next_expert", "removed")}
    numbers = (
        f"loss {losses['intact']:.3f}; {change['next_expert']:+.3f} with every token sent to the next expert, "
        f"{change['removed']:+.3f} without the experts, {statistics.mean(losses['random']) - losses['intact']:+.3f} "
        "with random ones in their place"
    )
    relies = losses["use_score"] > losses["use_limit"]
    excess = checkpoint["expert_noise_excess"]
    learned = [layer for layer, value in enumerate(excess) if value > NOISE_LIMIT]
    if learned:
        where = "every layer" if len(learned) == len(excess) else f"layer {', '.join(map(str, learned))} only"
        use = "the model relies on them" if relies else "on this text the model does as well with random ones"
        return {
            "label": "TRAINED" if len(learned) == len(excess) else "PARTLY TRAINED",
            "text": f"The experts carry learned structure in {where} (largest singular value at least "
            f"{min(excess[layer] for layer in learned):,.0f} standard deviations above noise, which stays below "
            f"{NOISE_LIMIT:g}), and {use} ({numbers}).",
        }

    furthest = max(
        abs(norm - start["norm"]) / start["sd"]
        for name, start in analysis["initial_norms"].items()
        for layer in checkpoint[f"{name}_norm"]
        for norm in layer
    )
    scale = "at the norms they started with" if furthest < NOISE_LIMIT else "though not at the norms of this config"
    noise = f"The experts are random noise in every layer, {scale}"
    if max(checkpoint["attention_noise_excess"]) <= NOISE_LIMIT:
        text = f"{noise}, and so is the attention: nothing in this model was ever trained ({numbers})."
        return {"label": "FRESHLY INITIALISED", "text": text}
    use = "relies on this very noise" if relies else "does as well with other noise"
    return {"label": "NOT TRAINED", "text": f"{noise}. The rest of the model was trained, and {use} ({numbers})."}
