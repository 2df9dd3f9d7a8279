"""Active latents per context: a text, an image or a sample."""

from typing import Any

import numpy as np

from saeflow.evaluation.correlation import correlation, partial_correlation
from saeflow.evaluation.measure import Result, Seen


class ContextMeans:
    """Mean L0, k and norm of every context over its evaluated rows, with its label and its objects.

    Args:
        contexts: of the split.
        columns: of the store; `label` and `objects` are taken over where it has them.
        listed: of so many contexts, the table `contexts` has a line.
    """

    def __init__(self, contexts: int, columns: Any, listed: int = 0) -> None:
        self.listed = listed
        self.tokens, self.l0, self.k_hat, self.norm = (np.zeros(contexts) for _ in range(4))
        self.facts = {
            name: np.full(contexts, -1) for name in ("label", "objects") if name in columns
        }
        self.has_k = False

    def update(self, seen: Seen) -> None:
        context = seen.column("context")
        np.add.at(self.tokens, context, 1)
        np.add.at(self.l0, context, seen.l0.cpu().numpy())
        np.add.at(self.norm, context, seen.x.double().norm(dim=1).cpu().numpy())
        if seen.allowed is not None:
            self.has_k = True
            np.add.at(self.k_hat, context, seen.allowed.double().cpu().numpy())
        for name, values in self.facts.items():
            values[context] = seen.column(name)

    @property
    def contexts(self) -> np.ndarray:
        """Numbers of the contexts that have evaluated rows."""
        return np.flatnonzero(self.tokens)

    def result(self) -> Result:
        return Result(self.metrics(), {"contexts": self.lines(self.listed)})

    def metrics(self) -> dict[str, float]:
        """Rank correlations with the number of objects, where it is known, and those given the norm."""
        if "objects" not in self.facts:
            return {}
        held = self.contexts
        objects, norm = self.facts["objects"][held], self.norm[held] / self.tokens[held]
        found = {"spearman_norm_objects": correlation(norm, objects)}
        for name, total in (("l0", self.l0), ("k_hat", self.k_hat)):
            if name == "l0" or self.has_k:
                mean = total[held] / self.tokens[held]
                found[f"spearman_{name}_objects"] = correlation(mean, objects)
                if found[f"spearman_{name}_objects"] is not None:
                    found[f"partial_{name}_objects"] = partial_correlation(mean, objects, norm)
        return {name: value for name, value in found.items() if value is not None}

    def line(self, context: int) -> dict[str, Any]:
        """Return one context's line of the table."""
        rows = self.tokens[context]
        return {
            **{
                name: int(self.facts[name][context]) if name in self.facts else None
                for name in ("label", "objects")
            },
            "l0": self.l0[context] / rows,
            "k_hat": self.k_hat[context] / rows if self.has_k else None,
            "norm": self.norm[context] / rows,
        }

    def lines(self, most: int) -> list[dict[str, Any]]:
        """One line for each of the first contexts."""
        return [{"context": int(i), **self.line(i)} for i in self.contexts[:most]]
