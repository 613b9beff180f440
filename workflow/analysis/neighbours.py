"""Which tokens lie near each other in the outputs of the experts."""

import torch
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors

from complexity_deep.workflow.analysis.analysed_text import TOKEN_CLASSES

NEIGHBOURS = 10


def embed(samples: dict, classes: list[str], seed: int) -> dict[int, dict]:
    """t-SNE of each sampled layer: points [n, 2], experts [n], and how often near neighbours share expert or class."""
    embedded = {}
    for layer, (outputs, experts) in samples.items():
        neighbours = min(NEIGHBOURS, len(outputs) - 1)
        near = NearestNeighbors(n_neighbors=neighbours).fit(outputs).kneighbors(return_distance=False)
        shares = {}
        for what, labels in (("expert", experts), ("class", torch.tensor([TOKEN_CLASSES.index(c) for c in classes]))):
            frequencies = labels.bincount().double() / len(labels)
            shares[f"same_{what}"] = (labels[torch.from_numpy(near)] == labels[:, None]).double().mean().item()
            shares[f"same_{what}_by_chance"] = frequencies.square().sum().item()
        perplexity = min(30, max(1, (len(outputs) - 1) // 3))
        points = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(outputs.numpy())
        embedded[layer] = {"points": points, "experts": experts.numpy(), "neighbours": shares}
    return embedded
