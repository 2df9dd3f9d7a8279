"""A language model in the loop: what a reconstruction at the hook point does to next-token predictions.

The clean side of the evaluation contexts, or of some evenly spread ones, is computed once per hook point and kept on disk
(`write_clean`); each SAE then costs only the blocks from the hook point on and the lm head.

Metrics are means over predicted tokens (position t predicts t + 1 within its context), in nats. Where
the source leaves first positions out (`skip_first`), an SAE has never seen one: the first position of
each context then keeps its clean activation, under the SAE, the mean and zero alike. Every other
position is replaced, whatever its norm.
"""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeflow.errors import UserError
from saeflow.evaluation.in_model import InModelResult, NearText
from saeflow.evaluation.in_model.token_losses import (
    clean_expectations,
    linear_head,
    losses_and_divergences,
    losses_and_divergences_from_expectations,
    token_losses,
)
from saeflow.evaluation.intervals import bounds, by_unit, count, resample
from saeflow.files import read_json, write_json
from saeflow.sources.copies import Copies
from saeflow.sources.heads import no_predictions
from saeflow.sources.hook_points import block_input_of, capture, resume_at, run_from
from saeflow.sources.models import load_model
from saeflow.sources.text import documents_of
from saeflow.stores.batches import read_ahead

logger = logging.getLogger(__name__)


CLEAN = "clean.json"
_RESAMPLING = {"resamples": 1000, "seed": 0}

Replace = Callable[[Tensor], Tensor]
"""Activations (n, d_in) float32, whatever the model's dtype, to what takes their place, same shape."""


def write_clean(
    source: Mapping[str, Any],
    folder: Path,
    hook_point: str,
    mean: Tensor,
    settings: Mapping[str, Any],
    labelled: Mapping[str, Path],
    device: str,
    out: Path,
) -> dict[str, str]:
    """Run the model on evaluation contexts and keep what every SAE is compared with.

    Args:
        source: the source's parameters.
        folder: the source's folder, with model/ and inputs/.
        hook_point: where activations are replaced.
        mean: (d_in,) mean row of the training split.
        settings: `ce_contexts`, the number of contexts, spread evenly over the split; None for all of it.
        labelled: not used.
        device: where the model runs.
        out: written. `contexts-NNNNN.safetensors`, one per `forward_batch` contexts, holds token_ids (n, length),
            activation (n, length, d_in), ce (n (length - 1),), and unit (n,), the document of each context;
            mean_rise and zero_rise (n,), what the mean and zero in the place of activations add to each context's sum;
            for hook points inside a block block_input (n, length, d_model); and what the KL needs, `clean_expectations`,
            or hidden (n, length, d_model) where the lm head is no plain matrix. clean.json holds the means over all of
            them, or why the model predicts no next tokens.

    Returns:
        That reason, for the record and the report.

    Raises:
        UserError: the split has fewer contexts than asked for.
    """
    available = np.load(folder / "inputs" / "evaluation.npy", mmap_mode="r")
    units = documents_of(folder / "inputs", "evaluation")
    ce_contexts = settings["ce_contexts"] or len(available)
    if ce_contexts > len(available):
        raise UserError(
            f"evaluation.ce_contexts: expected at most {len(available)} (contexts of the evaluation "
            f"split of {folder.name}), found {ce_contexts}. Lower it, or raise evaluation_rows."
        )
    chosen = np.arange(ce_contexts) * len(available) // ce_contexts
    model: Any = load_model(folder / "model", device)
    if (why_not := no_predictions(model)) is not None:
        logger.warning("no cross-entropy: %s", why_not)
        write_json(out / CLEAN, {"hook_point": hook_point, "why_not": why_not})
        return {"cross-entropy": f"not measured: {why_not}"}
    keep_first = bool(source["skip_first"])
    replacements: dict[str, Replace] = {
        "mean": constant(mean.to(device, torch.float32)),
        "zero": torch.zeros_like,
    }
    names = ("clean", *replacements)
    sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
    tokens = 0
    batch_size = source["forward_batch"]
    with torch.inference_mode():
        for number, start in enumerate(range(0, ce_contexts, batch_size)):
            rows = np.asarray(available[chosen[start : start + batch_size]], dtype=np.int64)
            token_ids = torch.as_tensor(rows, device=device)
            parts = clean_batch(model, hook_point, token_ids)
            parts["unit"] = torch.from_numpy(units[chosen[start : start + batch_size]])
            sums["clean"] += parts["ce"].sum()
            for name, replace in replacements.items():
                hidden = spliced_hidden(model, hook_point, parts, replace, keep_first)
                losses = token_losses(model, hidden, token_ids)
                sums[name] += losses.sum()
                parts[f"{name}_rise"] = (losses - parts["ce"]).reshape(len(rows), -1).sum(1)
            tokens += parts["ce"].numel()
            parts["token_ids"] = token_ids.to(torch.int32)
            save_file(
                {name: part.cpu().contiguous() for name, part in parts.items()},
                out / f"contexts-{number:05d}.safetensors",
            )
            logger.info("clean side: %d of %d contexts", start + len(rows), ce_contexts)
    means = {f"ce_{name}": float(total) / tokens for name, total in sums.items()}
    uniform = math.log(model.config.get_text_config().vocab_size)
    if means["ce_clean"] >= uniform:
        logger.warning(
            "%s: the model's own loss is %.2f nats, no less than ln(vocabulary) = %.2f, that of a uniform guess: its "
            "cross-entropy and KL divergence say nothing about an SAE.",
            hook_point, means["ce_clean"], uniform,
        )  # fmt: skip
    if means["ce_zero"] > uniform:
        logger.warning(
            "%s: with zero in the place of activations the loss is %.2f nats, above ln(vocabulary) = %.2f, that of a "
            "uniform guess: loss recovered against zero is inflated. Read the one against the mean (%.2f nats).",
            hook_point, means["ce_zero"], uniform, means["ce_mean"],
        )  # fmt: skip
    write_json(
        out / CLEAN,
        {
            "hook_point": hook_point,
            "contexts": ce_contexts,
            "share": ce_contexts / len(available),
            "ce_uniform": uniform,
            "context_length": int(available.shape[1]),
            "tokens": tokens,
            "keep_first": keep_first,
            **means,
        },
    )
    return {}


def constant(row: Tensor) -> Replace:
    """A replacement that puts `row` (d_in,) in the place of every activation."""
    return lambda x: row.to(x.dtype).expand_as(x)


def clean_batch(model: Any, hook_point: str, token_ids: Tensor) -> dict[str, Tensor]:
    """Run the unchanged model on contexts (n, length) and return what `write_clean` keeps."""
    names = {"activation": hook_point}
    block_input = block_input_of(model, hook_point)
    if block_input is not None and resume_at(model, hook_point) is None:
        names["block_input"] = block_input
    found = capture(model, names.values(), token_ids)
    parts = {"token_ids": token_ids, **{part: found[name] for part, name in names.items()}}
    hidden = spliced_hidden(model, hook_point, parts, lambda x: x, keep_first=False)
    head = linear_head(model)
    if head is None:
        parts |= {"hidden": hidden, "ce": token_losses(model, hidden, token_ids)}
    else:
        kept = ("ce", "expected", "offsets")
        parts |= zip(kept, clean_expectations(model, head, hidden, token_ids), strict=True)
    return parts


def spliced_hidden(
    model: Any,
    hook_point: str,
    parts: Mapping[str, Tensor],
    replace: Replace,
    keep_first: bool,
) -> Tensor:
    """Final hidden states (n, length, d_model) with `replace` at the hook point.

    Args:
        parts: token_ids, activation and, where the hook's block must run, block_input of some
            contexts.
        keep_first: the first position of each context keeps its clean activation.
    """
    x, token_ids = parts["activation"], parts["token_ids"]
    first = 1 if keep_first else 0
    spliced = x.clone()
    rows = x[:, first:].reshape(-1, x.shape[-1])
    spliced[:, first:] = replace(rows.float()).reshape(x[:, first:].shape).to(x.dtype)
    resumed = resume_at(model, hook_point)
    if resumed is None:
        return run_from(model, hook_point, parts.get("block_input"), token_ids, lambda _: spliced)
    return run_from(model, resumed, spliced, token_ids, lambda block_input: block_input)


class NextTokens:
    """Cross-entropy and KL of any replacement, against a clean side that `write_clean` left.

    Args:
        clean: its folder.
        model_folder: the source's model.
        device: where the model runs.
    """

    def __init__(self, clean: Path, model_folder: Path, device: str) -> None:
        self.summary = read_json(clean / CLEAN)
        found = clean.glob("contexts-*.safetensors")
        self.files = sorted(found, key=lambda path: int(path.stem.removeprefix("contexts-")))
        self.model = load_model(model_folder, device)
        self.device = device
        if not self.is_measured:
            return
        kept = self._kept("unit", "mean_rise", "zero_rise")
        self.units = kept.pop("unit")
        self.mean_costs, self.zero_costs = (
            self._costs(kept[name]) for name in ("mean_rise", "zero_rise")
        )

    def _kept(self, *names: str) -> dict[str, np.ndarray]:
        """Return arrays (contexts,) of the clean side."""
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for path in self.files:
            with safe_open(path, "np") as file:
                for name, parts in found.items():
                    parts.append(file.get_tensor(name))
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def _costs(self, rise: np.ndarray) -> bool:
        """Return whether an ablation raises the loss: its 95 % interval (of one document, its value) is above 0."""
        sums = by_unit({"rise": rise}, self.units)
        low, _ = bounds(resample(sums, _RESAMPLING)["rise"], count(sums))
        return (float(rise.sum()) if low is None else low) > 0

    @property
    def is_measured(self) -> bool:
        """The model predicts next tokens."""
        return "why_not" not in self.summary

    def sums(self, replace: Replace) -> dict[str, np.ndarray]:
        """Return the sums of each context with one replacement, such as an SAE's `forward`.

        Returns:
            (contexts,) float64: rise (spliced minus clean cross-entropy) and divergence in nats, over
            tokens, the number of predicted ones.

        Raises:
            UserError: the model's output is not finite.
        """
        found: dict[str, list[Tensor]] = {"rise": [], "divergence": [], "tokens": []}
        with torch.inference_mode():
            copies = Copies(self.device)
            for read in read_ahead(iter(self.files), load_file, readers=1):
                parts = {name: copies.to_device(part) for name, part in read.items()}
                hidden = spliced_hidden(
                    self.model,
                    self.summary["hook_point"],
                    parts,
                    replace,
                    self.summary["keep_first"],
                )
                losses, divergences = self._compare(hidden, parts)
                each = {"rise": losses - parts["ce"], "divergence": divergences}
                contexts = len(parts["token_ids"])
                for name, values in (each | {"tokens": torch.ones_like(losses)}).items():
                    found[name].append(values.reshape(contexts, -1).sum(1))
        whole = {name: torch.cat(values).cpu().numpy() for name, values in found.items()}
        if not np.isfinite(whole["rise"].sum() + whole["divergence"].sum()):
            raise UserError(
                f"{self.files[0].parent}: the model's output is not finite with the reconstruction "
                "spliced in. Check the SAE's weights; train it again."
            )
        return whole

    def measure(self, sae: Any, *, is_trained: bool) -> InModelResult:
        """Cross-entropy and KL with an SAE's or a baseline's reconstructions in the model; without predictions, why not."""
        if not self.is_measured:
            line = {"what": "cross-entropy", "why": self.summary["why_not"]}
            return InModelResult({}, tables={"unmeasured": [line]})
        sums = self.sums(sae.forward)
        return InModelResult(self.metrics(sums), by_unit(sums, self.units), np.unique(self.units))

    def name_latents(self, sae: Any, latents: np.ndarray) -> list[NearText]:
        """Nothing: next tokens give no text to compare latents with."""
        return []

    def metrics(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return the metrics of one replacement, from its `sums`."""
        summary = self.summary
        rise, divergence, tokens = (float(sums[n].sum()) for n in ("rise", "divergence", "tokens"))
        clean = summary["ce_clean"]
        spliced = clean + rise / tokens
        metrics = {
            "ce_clean": clean,
            "ce_spliced": spliced,
            "ce_mean": summary["ce_mean"],
            "ce_zero": summary["ce_zero"],
            "ce_uniform": summary["ce_uniform"],
            "ce_degradation": rise / tokens,
            "kl": divergence / tokens,
            "ce_tokens": tokens,
            "ce_contexts": float(summary["contexts"]),
            "ce_share": summary["share"],
            "ce_first_position_kept": float(summary["keep_first"]),
        }
        for name, ablated, costs in (
            ("loss_recovered_of_mean", summary["ce_mean"], self.mean_costs),
            ("loss_recovered", summary["ce_zero"], self.zero_costs),
        ):
            if costs:
                metrics[name] = (ablated - spliced) / (ablated - clean)
        return metrics

    def _compare(self, hidden: Tensor, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        token_ids = parts["token_ids"]
        if "hidden" in parts:
            return losses_and_divergences(self.model, hidden, parts["hidden"], token_ids)
        return losses_and_divergences_from_expectations(
            self.model, hidden, parts["expected"], parts["offsets"], token_ids
        )


open_clean = NextTokens
