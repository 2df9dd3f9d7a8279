"""The form that libraries share: an affine encoder, one of four activations and an affine decoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from saeflow.config.variants import with_defaults
from saeflow.errors import UserError
from saeflow.saes.base import SAE
from saeflow.saes.batch_topk import BatchTopK
from saeflow.saes.feature_choice import FeatureChoice
from saeflow.saes.gated import Gated
from saeflow.saes.jumprelu import JumpReLU
from saeflow.saes.p_anneal import PAnneal
from saeflow.saes.relu import ReLU
from saeflow.saes.topk import TopK
from saeflow.saes.variants import build

Kind = Literal["relu", "topk", "jumprelu", "gated", "matching_pursuit"]
_CONSTANT = {"kind": "constant"}
_AFFINE = ("W_enc", "b_enc", "W_dec", "b_dec")
_LEAST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Plain:
    """latents = f((x - b_dec) W_enc + b_enc), x_hat = latents W_dec + b_dec, in raw-activation units.

    Attributes:
        kind: f: relu; topk, the k largest after relu; jumprelu, a 1[a > threshold]; gated, where b_enc is
            the gate's bias and the magnitude is relu(exp(r_mag) u + b_mag) of u = (x - b_dec) W_enc; matching_pursuit,
            a pursuit of x - b_dec with the rows of W_dec, whose W_enc is its transpose and whose b_enc is 0.
        W_enc (d_in, d_sae), b_enc (d_sae), W_dec (d_sae, d_in), b_dec (d_in): float32.
        k: of topk.
        threshold: (d_sae) of jumprelu, above 0.
        r_mag, b_mag: (d_sae) of gated.
        pursuit: options of the variant matching_pursuit.
    """

    kind: Kind
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    k: int | None = None
    threshold: Tensor | None = None
    r_mag: Tensor | None = None
    b_mag: Tensor | None = None
    pursuit: Mapping[str, Any] | None = None

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    def check(self, path: Path) -> "Plain":
        """Itself, if its parts fit each other and are finite.

        Raises:
            UserError: they do not, naming each part.
        """
        d_in, d_sae = self.W_dec.shape[::-1] if self.W_dec.ndim == 2 else (0, 0)
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,),
            "threshold": (d_sae,), "r_mag": (d_sae,), "b_mag": (d_sae,),
        }  # fmt: skip
        for name, expected in shapes.items():
            part = getattr(self, name)
            if part is None:
                continue
            if part.shape != expected or 0 in expected:
                raise UserError(
                    f"{path}: {name}: expected shape {list(expected)}, found {list(part.shape)}. Export the SAE again."
                )
            if not bool(part.isfinite().all()):
                raise UserError(f"{path}: {name} is not finite. Export the SAE again.")
        if self.kind == "topk" and not (type(self.k) is int and 1 <= self.k <= d_sae):
            raise UserError(
                f"{path}: k: expected a whole number in 1..{d_sae}, found {self.k!r}. Export the SAE again."
            )
        return self


def affine(sae: SAE) -> dict[str, Any]:
    """Encoder of x - b_dec and decoder of an SAE, float32 on the CPU."""
    W_enc, b_enc = sae.readers()
    parts = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    return {name: part.detach().float().cpu().contiguous().clone() for name, part in parts.items()}


def plain_of(sae: SAE) -> Plain:
    """Return the plain form that computes exactly what a trained SAE computes in use.

    BatchTopK and Matryoshka become jumprelu with their one threshold, Feature Choice with its own, P-anneal relu.

    Raises:
        UserError: a variant whose selection depends on more than each latent's own pre-activation or a
            fixed k.
    """
    with torch.no_grad():
        match sae:
            case TopK() if not sae.is_signed:
                return Plain("topk", **affine(sae), k=int(sae.k))
            case BatchTopK():
                threshold = sae.threshold.cpu().expand(sae.d_sae).clone()
                return Plain("jumprelu", **affine(sae), threshold=threshold)
            case FeatureChoice():
                return Plain("jumprelu", **affine(sae), threshold=sae.threshold.cpu().clone())
            case JumpReLU():
                return Plain("jumprelu", **affine(sae), threshold=sae.theta.cpu().clone())
            case Gated():
                r_mag, b_mag = sae.r_mag.cpu().clone(), sae.b_mag.cpu().clone()
                return Plain("gated", **affine(sae), r_mag=r_mag, b_mag=b_mag)
            case ReLU() | PAnneal():
                return Plain("relu", **affine(sae))
    raise UserError(
        f"{type(sae).__name__}: expected a variant that other libraries know (relu, p_anneal, topk, batch_topk, "
        "matryoshka, feature_choice, jumprelu, gated), found one that chooses its latents otherwise. Take --library hub, which holds "
        "any variant, or for soft_topk and adaptive_k give --store to calibrate a threshold on."
    )


def sae_of(plain: Plain) -> tuple[str, dict[str, Any], SAE]:
    """The SAE that does what `plain` says: its variant, its options, and itself, in evaluation mode.

    Options of training stand at values that change nothing in use; a threshold of 0 or below, under which
    relu alone decides, becomes the smallest positive number.
    """
    options: Mapping[str, Any]
    extra: dict[str, Tensor] = {}
    match plain.kind:
        case "topk":
            options = {"k": plain.k, "k_schedule": _CONSTANT, "auxk_weight": 0.0}
        case "jumprelu":
            assert plain.threshold is not None
            options = {
                "l0_weight": 0.0, "l0_schedule": _CONSTANT, "target_l0": None, "target_schedule": _CONSTANT,
                "threshold": 0.001, "bandwidth": 0.001,
            }  # fmt: skip
            extra["log_theta"] = plain.threshold.double().clamp(min=_LEAST).log().float()
        case "gated":
            assert plain.r_mag is not None
            assert plain.b_mag is not None
            options = {"l1": 0.0, "l1_schedule": _CONSTANT}
            extra |= {"r_mag": plain.r_mag, "b_mag": plain.b_mag}
        case "relu":
            options = {"l1": 0.0, "l1_schedule": _CONSTANT}
        case "matching_pursuit":
            assert plain.pursuit is not None
            options = plain.pursuit
    whole = with_defaults(plain.kind, options)
    sae = build(plain.kind, plain.d_in, plain.d_sae, whole)
    names = ("W_dec", "b_dec") if plain.kind == "matching_pursuit" else _AFFINE
    parts = {name: getattr(plain, name) for name in names}
    sae.load_state_dict(sae.state_dict() | parts | extra)
    return plain.kind, whole, sae.eval()
