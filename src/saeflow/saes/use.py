"""The part of an SAE that its users call: activations to latents, latents to activations."""

from torch import Tensor

from saeflow.errors import UserError
from saeflow.operators import pre_acts
from saeflow.saes.contract import Contract


def check_width(what: str, x: Tensor, width: int) -> None:
    """Check the last dimension of what an SAE is given.

    Raises:
        UserError: it is another.
    """
    if x.ndim == 0 or x.shape[-1] != width:
        raise UserError(
            f"SAE: expected {what} (..., {width}), found the shape {list(x.shape)}. Give those of the model and hook "
            "point that it was trained on."
        )


class Usable(Contract):
    """A trained SAE, as `saeflow.load` returns it, takes and returns raw activations.

    Besides the methods below a user may call `allowed_k`, `directions` and `readers` of the contract, and read
    `d_in`, `d_sae`, `d_out` and the weights.
    """

    def __repr__(self) -> str:
        """One line: variant, sizes, and of an SAE that was loaded where it was trained."""
        sizes = f"{self.d_in} -> {self.d_sae} latents"
        return f"{type(self).__name__}({', '.join(filter(None, (sizes, self.origin)))})"

    def encode(self, x: Tensor) -> Tensor:
        """Activations (..., d_in) to latents (..., d_sae), dense.

        Raises:
            UserError: activations of another width.
        """
        check_width("activations", x, self.d_in)
        flat = x.reshape(-1, self.d_in)
        latents = self.activate(self.pre_activations(flat), self.condition(flat))
        return latents.reshape(*x.shape[:-1], self.d_sae)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (..., d_sae) to reconstruction (..., d_out).

        Raises:
            UserError: another number of latents.
        """
        check_width("latents", latents, len(self.W_dec))
        return self.rebuild(latents @ self.W_dec)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct from activations (..., d_in): (..., d_out)."""
        return self.decode(self.encode(x))

    def latent_scores(self, x: Tensor) -> Tensor:
        """Return (inputs - centre) matrix + bias (B, d_sae) of `factors`, in the precision of the product."""
        return pre_acts(*self.factors(x))

    def pre_activations(self, x: Tensor) -> Tensor:
        """Return `latent_scores`, float32 also of bfloat16 products."""
        return self.latent_scores(x).to(self.W_dec.dtype)
