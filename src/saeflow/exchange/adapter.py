"""An SAE as SAEBench (sae-bench 0.6) and sae-probes (0.4) take one: weights, a config, `encode` and `decode`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saeflow.errors import UserError
from saeflow.exchange.hook_names import theirs
from saeflow.saes.base import SAE
from saeflow.saes.files import load, read_config


@dataclass
class AdapterConfig:
    """The fields of an SAE's `cfg` that SAEBench reads and may set (its CustomSAEConfig)."""

    model_name: str
    d_in: int
    d_sae: int
    hook_name: str
    hook_layer: int
    architecture: str
    dtype: str
    device: str
    context_size: int | None = None
    hook_head_index: int | None = None
    prepend_bos: bool = True
    normalize_activations: str = "none"
    apply_b_dec_to_input: bool = True
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -100_000  # SAEBench's own word for unknown
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as SAEBench writes them beside its results."""
        return asdict(self)


class Adapter(nn.Module):
    """Any saeflow SAE behind the attributes that SAEBench and sae-probes ask for.

    Both count on decoder rows of unit norm. Where the SAE's rows have another, latents are counted in units of
    their rows' norms: `decode(encode(x))` stays what it was. (A row that is zero stays zero.)

    The SAE computes in its own precision (float32); `to(dtype)` changes what the weights below are given in and
    what `dtype` says. Latents and reconstructions have the dtype and leading shape of what they are made from.

    Args:
        sae: as `saeflow.load` returns it.
        model_name: of the model as TransformerLens knows it, such as gpt2-small.
        hook_point: where the SAE reads the model, such as blocks.8.resid_post.
        architecture: what `cfg.architecture` says.

    Attributes:
        W_dec (d_sae, d_in): what each latent adds to a reconstruction; unit rows.
        b_dec (d_in): what is added to all of them; 0 where the SAE has none.
        W_enc (d_in, d_sae), b_enc (d_sae): what a latent's pre-activation is linear in, in the latents' units:
            (x - b_dec) W_enc + b_enc. Of a gated SAE it is the gate's. Of a sparsemax or entmax SAE it is
            the score's before the simplex projection, and x - b_dec is a unit vector there; with shared
            concepts C, W_enc = scale W_Q W_K^T C^T. Both libraries compare its columns with directions only;
            what an SAE does is in `encode`.
        cfg: an AdapterConfig.

    Raises:
        UserError: the hook point is no place of a language model.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def __init__(
        self, sae: SAE, model_name: str, hook_point: str, architecture: str = "saeflow"
    ) -> None:
        super().__init__()
        names = theirs(hook_point)
        if "layer" not in names:
            raise UserError(
                f"hook_point: expected a place of a language model, such as blocks.8.resid_post, found {hook_point!r}. "
                "SAEBench and sae-probes read no others."
            )
        sae = sae.eval().requires_grad_(False)
        self._sae = (sae,)  # no submodule: it keeps its precision
        with torch.no_grad():
            matrix, bias = sae.readers()
            directions = sae.directions()
            norms = directions.double().norm(dim=1)
            norms = torch.where(norms > 0, norms, 1).to(directions.dtype)
            b_dec = sae.b_dec if sae.b_dec is not None else directions.new_zeros(sae.d_in)
            for name, part in (
                ("W_enc", matrix * norms),
                ("b_enc", bias * norms),
                ("W_dec", directions / norms[:, None]),
                ("b_dec", b_dec.clone()),
            ):
                self.register_buffer(name, part.contiguous())
        self._norms = norms
        self.cfg = AdapterConfig(
            model_name=model_name, d_in=sae.d_in, d_sae=sae.d_sae, hook_name=names["hook_name"],
            hook_layer=names["layer"], architecture=architecture, dtype=_name(self.dtype), device=str(self.device),
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    def encode(self, x: Tensor) -> Tensor:
        """Activations (..., d_in) to latents (..., d_sae), dense, dtype of `x`."""
        (sae,) = self._sae
        return (sae.encode(x.to(sae.W_dec.dtype)) * self._norms).to(x.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (..., d_sae) to reconstructions (..., d_in), dtype of `latents`."""
        (sae,) = self._sae
        return sae.decode(latents.to(sae.W_dec.dtype) / self._norms).to(latents.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct activations (..., d_in)."""
        return self.decode(self.encode(x))

    def check_decoder_norms(self) -> bool:
        """Return whether every decoder row has unit norm, within its dtype's resolution."""
        norms = self.W_dec.float().norm(dim=1)
        tolerance = 1e-5 if self.dtype in (torch.float32, torch.float64) else 1e-2
        return bool((norms - 1).abs().max() <= tolerance)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        """Implement `to`, `cuda`, `half` and the like: the SAE follows to the device and keeps its dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        (sae,) = self._sae
        sae.to(self.device)
        self._norms = self._norms.to(self.device)
        self.cfg.dtype, self.cfg.device = _name(self.dtype), str(self.device)
        return self


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def adapt(folder: Path | str, model_name: str) -> Adapter:
    """A trained SAE for SAEBench and sae-probes.

    Args:
        folder: of the SAE.
        model_name: the model it was trained on, as TransformerLens knows it, such as gpt2-small.

    Raises:
        UserError: no SAE is there, or it was trained on no language model.
    """
    config = read_config(Path(folder))
    try:
        architecture = f"saeflow-{config['variant']}"  # SAEBench reads b_mag of a `gated` one
        return Adapter(load(folder), model_name, config.get("hook_point", ""), architecture)
    except UserError as error:
        if str(folder) in str(error):
            raise
        raise UserError(f"{folder}: {error}") from None
