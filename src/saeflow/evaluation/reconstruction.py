"""Quality of reconstruction: sums over the whole split in float64, divided once.

With x (rows, d_in) the evaluated activations, e = x - x_hat and m the mean row,
`saeflow.tables.metrics` defines each metric. Formulas that the field reports under the same words are kept apart by name, for
comparison with published numbers only.
"""

import torch
from torch import Tensor

from saeflow.errors import UserError

_LAYERNORM_EPS = 1e-5  # BatchTopK, `preprocess_input`
_TINY = 1e-24  # relative squared spread below which rows are equal but for rounding


class Reconstruction:
    """Streaming sums; the result does not depend on how the rows are cut into batches.

    Args:
        mean: (d_in,) float64, mean of the rows that will be added (RowStatistics.mean).
    """

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean.double()
        self.rows = 0
        names = ("error", "power", "spread", "cosine", "norm", "norm_hat", "legacy", "token", "std")
        self.sums = {name: mean.new_zeros((), dtype=torch.float64) for name in names}
        self.counts = {name: mean.new_zeros((), dtype=torch.int64) for name in ("legacy", "token")}
        self.error_sum = torch.zeros_like(self.mean)

    def add(self, x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
        """Add activations and their reconstruction, both (n, d_in), any floating dtype.

        Returns:
            What each row adds, (n,) float64: error |e|^2, power |x|^2, spread |x - m|^2, cosine.
        """
        x, x_hat = x.double(), x_hat.double()
        error = x - x_hat
        squared_error = error.square().sum(1)
        power, power_hat = x.square().sum(1), x_hat.square().sum(1)
        spread = (x - self.mean).square().sum(1)
        norms = (power * power_hat).sqrt()
        cosine = torch.where(norms > 0, (x * x_hat).sum(1) / norms.where(norms > 0, 1.0), 0.0)
        added = {
            "error": squared_error, "power": power, "spread": spread, "cosine": cosine,
            "norm": power.sqrt(), "norm_hat": power_hat.sqrt(),
        }  # fmt: skip
        terms = {name: added[name] for name in ("error", "power", "spread", "cosine")}
        for name, by in (("legacy", spread), ("token", power)):
            defined = by > 0
            added[name] = torch.where(defined, squared_error / by, 0.0)
            self.counts[name] += defined.sum()
        if x.shape[1] > 1:
            added["std"] = squared_error / (x.std(1) + _LAYERNORM_EPS).square()
        for name, values in added.items():
            self.sums[name] += values.sum()
        self.error_sum += error.sum(0)
        self.rows += len(x)
        return terms

    def metrics(self) -> dict[str, float]:
        """Return every metric of reconstruction.

        Raises:
            UserError: the activations are all equal (their variance is 0), or something is not
                finite.
        """
        if not self.rows:
            raise UserError("expected at least one row to evaluate, found none.")
        total = {name: float(value) for name, value in self.sums.items()}
        if not all(value == value and abs(value) != float("inf") for value in total.values()):
            raise UserError(
                f"the sums over {self.rows} rows are not finite: activations or weights hold NaN or "
                "infinity. Check the store with `saeflow verify`, then train the SAE again."
            )
        if total["spread"] <= _TINY * max(total["power"], 1e-300):
            raise UserError(
                f"all {self.rows} evaluated rows are equal, so the fraction of variance unexplained "
                "has no value. Extract activations of a hook point that varies."
            )
        width = len(self.mean)
        entries = self.rows * width
        error_bias = float(self.error_sum.square().sum()) / self.rows
        scalar_spread = self.rows * float((self.mean - self.mean.mean()).square().sum())
        fvu = total["error"] / total["spread"]
        metrics = {
            "nmse": total["error"] / total["power"],
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "cosine": total["cosine"] / self.rows,
            "relative_norm": total["norm_hat"] / total["norm"],
            "mse": total["error"] / entries,
            "fve_dictionary_learning": 1 - max(total["error"] - error_bias, 0.0) / total["spread"],
            "ev_legacy_saelens": 1 - total["legacy"] / int(self.counts["legacy"]),
            "nmse_token_openai": total["token"] / int(self.counts["token"]),
            "r2_overcomplete": 1 - total["error"] / (total["spread"] + scalar_spread),
        }
        error, power = total["error"] / self.rows, total["power"] / self.rows
        if power != (power / width) ** 2:
            metrics["ev_saelens_6_18"] = 1 - error / (power - (power / width) ** 2)
        if width > 1:
            metrics["nmse_layernorm_batchtopk"] = total["std"] / entries
        return metrics
