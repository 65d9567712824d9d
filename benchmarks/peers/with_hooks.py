"""The baseline: forward hooks as a person writes them, and a loop with `output_hidden_states`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from job import OnTransformers, main, row_coefficients


class Hooks(OnTransformers):
    def vector(self) -> None:
        means = []
        for texts in (self.job["positive"], self.job["negative"]):
            rows = []
            for start in range(0, len(texts), 32):
                batch = self.tokenizer(texts[start : start + 32], return_tensors="pt", padding=True)
                with torch.no_grad():
                    states = self.model(**batch, output_hidden_states=True, use_cache=False).hidden_states
                rows.append(torch.stack([state[:, -1] for state in states], 1))
            means.append(torch.cat(rows).mean(0))
        assert bool(torch.isfinite(means[0] - means[1]).all())

    @contextmanager
    def steered(self, case: str) -> Iterator[None]:
        layers = self.model.model.layers
        handles = []
        if case == "plan per row":
            add, ablate = (torch.from_numpy(x)[:, :, None, None] for x in row_coefficients(self.job))
            for n in self.job["layers"]:
                v = self.directions[n]
                q = v / v.norm()

                def change(_m, _a, h, v=v, q=q, c=add[n], s=ablate[n]):  # type: ignore[no-untyped-def]
                    return h + c * v - s * (h @ q).unsqueeze(-1) * q

                handles.append(layers[n].register_forward_hook(change))
        else:
            for n in self.layers(case):
                handles.append(layers[n].register_forward_hook(lambda _m, _a, h, v=self.directions[n]: h + v))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


if __name__ == "__main__":
    main(Hooks)
