"""Controls: what a direction is to be compared with.

A control has the layers and lengths of the vector it stands in for, and never anything else of it.
"""

from __future__ import annotations

import numpy as np
import torch

from faststeer.vector import SteeringVector


def random_like(vector: SteeringVector, seed: int) -> SteeringVector:
    """Return random directions, uniform on the sphere, with the norms, layers and hook point of `vector`.

    What this control achieves as well is the work of the perturbation's size alone. A layer's direction depends on
    `seed` and the layer, not on which other layers there are.

    Raises:
        ValueError: a negative seed.
    """
    directions = {}
    for layer in vector.layers:
        draw = torch.from_numpy(np.random.default_rng([seed, layer]).standard_normal(vector.hidden_size))
        length = vector[layer].detach().double().norm().cpu()
        directions[layer] = (draw / draw.norm() * length).to(vector[layer])
    provenance = {"seed": seed, "like": vector.method}
    return SteeringVector(
        directions, at=vector.at, model=vector.model, method="random", scale=vector.scale, provenance=provenance
    )
