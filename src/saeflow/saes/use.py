"""The part of an SAE that its users call: activations to latents, latents to activations."""

from torch import Tensor

from saeflow.operators import pre_acts
from saeflow.saes.contract import Contract


class Usable(Contract):
    """A trained SAE, as `saeflow.load` returns it, takes and returns raw activations.

    Besides the methods below a user may call `allowed_k`, `directions` and `readers` of the contract, and read
    `d_in`, `d_sae`, `d_out` and the weights.
    """

    def encode(self, x: Tensor) -> Tensor:
        """Activations (..., d_in) to latents (..., d_sae), dense."""
        flat = x.reshape(-1, self.d_in)
        latents = self.activate(self.pre_activations(flat), self.condition(flat))
        return latents.reshape(*x.shape[:-1], self.d_sae)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (..., d_sae) to reconstruction (..., d_out)."""
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
