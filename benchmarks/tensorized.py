"""One layer of the story model replaced at a time: methods for a matrix at equal parameters, with and without the data.

    python benchmarks/tensorized.py

For every layer, method and share of its parameters: the MACs it then takes, the loss that is predicted, and the loss
that is measured on texts that calibration has not seen. Texts are those of studies/stories.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "studies"))

import stories  # type: ignore[import-not-found]

from rankopt.batches import as_batches
from rankopt.calibration import CalibrationOptions, calibrate
from rankopt.decompositions import method
from rankopt.divergence import Divergence
from rankopt.factors import Factors
from rankopt.layers import find_layers
from rankopt.plan import LayerChoice, Plan
from rankopt.prediction import predict
from rankopt.rank_split import split
from rankopt.surgery import apply

LAYERS = ("tokens", "layers.2.attention.wq", "layers.2.w1")
METHODS = ("svd", "tt_matrix", "tucker_matrix")
KEEPS = (0.3, 0.6, 0.9)


def main() -> None:
    """Print the table."""
    model, data = stories.model(), stories.data()
    calibration, validation = data["calibration"][0], data["validation"][0]
    layers = [layer for layer in find_layers(model, calibration[:1]) if layer.name in LAYERS]
    divergence = Divergence.of(model(calibration[:1]))
    batches = as_batches(calibration, batch_size=32)
    found = calibrate(model, layers, batches, divergence, CalibrationOptions(fisher_samples=64, draws=2))
    with torch.no_grad():
        dense = model(validation)

    def measured(changed: nn.Module) -> float:
        with torch.no_grad():
            return float(divergence.between(dense, changed(validation)).mean())

    print("| layer | metric | choice | params kept | MACs kept | predicted kl | measured kl |")
    print("|---|---|---|---|---|---|---|")
    for layer in layers:
        for known in (True, False):
            factors = Factors(model, {layer.name: found[layer.name].metric} if known else None)
            for name in METHODS:
                way = method(name)
                for ranks in split(way, layer, factors.full(layer, name), KEEPS, quantity="params").values():
                    choice = LayerChoice(name, ranks)
                    losses, _ = predict((layer,), [choice], factors, [found[layer.name]], {})
                    kl = measured(apply(model, Plan({layer.name: choice}), factors))
                    params, macs = way.params(layer, ranks) / layer.params, way.macs(layer, ranks) / layer.macs
                    cells = [f"`{layer.name}`", "data" if known else "none", f"`{choice}`"]
                    cells += [f"{params:.2f}", f"{macs:.2f}", f"{losses[0]:.4f}", f"{kl:.4f}"]
                    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
