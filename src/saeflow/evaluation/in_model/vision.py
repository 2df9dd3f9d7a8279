"""A CLIP model in the loop: zero-shot accuracy with reconstructions in the place of an image's activations.

The clean side is every token's activation of the images of labelled sets and the texts of their classes,
computed once a hook point (`write_clean`); an SAE's latents are computed once an image, for all settings of
the top-n protocols.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeflow.evaluation.in_model import InModelResult, NearText
from saeflow.evaluation.measure import Lines
from saeflow.evaluation.zero_shot import LabelledSets, write_labelled
from saeflow.evaluation.zero_shot.accuracy import Accuracy
from saeflow.evaluation.zero_shot.class_texts import unit
from saeflow.evaluation.zero_shot.top_n import Setting, kept, masks, rank, spooled

_SHUFFLES, _CHANCE = 100, 0.95


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
    """Run the model on every labelled set and keep what every SAE is measured on.

    Args:
        source: the source's parameters.
        folder: the source's folder, with model/.
        hook_point: where the SAEs read.
        mean: not used.
        settings: `concept_cards`, whose prompts concepts are compared with; null for none.
        labelled: by name, the folders that `prepare_labelled` wrote.
        device: where the model runs.
        out: written, see `write_labelled`.

    Returns:
        Nothing that readers of the record should know.
    """
    cards = settings["concept_cards"]
    prompts: Sequence[str] = cards["prompts"] if cards else []
    write_labelled(source, folder, labelled, prompts, hook_point, device, out)
    return {}


class ZeroShot:
    """Classification of labelled sets, against a clean side that `write_clean` left.

    Args:
        clean: its folder.
        model_folder: the source's model.
        device: where the model and the SAEs run.
    """

    def __init__(self, clean: Path, model_folder: Path, device: str) -> None:
        self.sets = LabelledSets(clean, model_folder, device)

    @property
    def model(self) -> Any:
        """The CLIP model."""
        return self.sets.model

    def measure(self, sae: Any, *, is_trained: bool) -> InModelResult:
        """Accuracy with an SAE or a baseline in the model.

        Args:
            sae: `encode`, `decode` and, of an SAE, `decode_selected`; on the device.
            is_trained: it is an SAE: classify through a few of its concepts too.

        Returns:
            The metrics of zero-shot classification; the table `classification` with a line for each set and setting.
        """
        lines: Lines = []
        spliced, clean, chance = [], [], []
        with torch.inference_mode():
            for name, known in self.sets.summary["sets"].items():
                found = self._evaluate_set(sae, name, known, top_n=is_trained)
                spliced.append(found[0]["accuracy"])
                clean.append(known["accuracy"])
                chance.append(1 / len(known["classes"]))
                lines += found
        if not lines:
            return InModelResult({}, tables={"classification": lines})
        metrics = {
            "zero_shot_clean": float(np.mean(clean)),
            "zero_shot": float(np.mean(spliced)),
            "zero_shot_chance": float(np.mean(chance)),
        }
        return InModelResult(metrics, tables={"classification": lines})

    def _evaluate_set(self, sae: Any, name: str, known: Mapping[str, Any], *, top_n: bool) -> Lines:
        sets = self.sets
        text = sets.class_texts(name)
        n_classes = len(text)
        shared = {
            "set": name, "classes": n_classes, "images": known["test_images"],
            "clean_accuracy": known["accuracy"],
        }  # fmt: skip
        whole = Accuracy(n_classes)
        if not top_n:
            for parts in sets.batches(name, "test"):
                rows = sets.rows_of(parts)
                flat = sae.forward(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)
                whole.add(sets.embed_rows(parts, flat).cpu() @ text.t(), parts["labels"].cpu())
            return [_line(shared, Setting("all", "true", "on", None), whole)]
        with tempfile.TemporaryDirectory() as temporary:
            spool = Path(temporary)
            ranks = rank(sets, sae, name, n_classes, spool)
            found = masks(ranks)
            scores = {setting: Accuracy(n_classes) for setting in found}
            sizes = dict.fromkeys(found, 0.0)
            start = 0
            for parts, latents in spooled(sets, name, spool, ranks.d_sae):
                labels = parts["labels"].cpu()
                permuted = ranks.permuted[start : start + len(labels)]
                start += len(labels)
                rows = sets.rows_of(parts)
                full = sae.decode_selected(latents)
                nothing = sae.decode_selected(latents.with_values(latents.values * 0))
                whole.add(self._scores(parts, full, rows, text), labels)
                tokens = rows.shape[1]
                for setting, mask in found.items():
                    own = labels if setting.labels == "true" else permuted
                    left = kept(latents, mask.to(latents.columns.device), own, tokens)
                    part = sae.decode_selected(latents.with_values(latents.values * left))
                    x_hat = part if setting.concepts == "on" else full - part + nothing
                    scores[setting].add(self._scores(parts, x_hat, rows, text), own)
                    sizes[setting] += float(left.sum())
        lines = [_line(shared, Setting("all", "true", "on", None), whole, kept=ranks.d_sae)]
        n_tokens = known["test_images"] * tokens
        for setting, mask in found.items():
            chosen = float(mask.sum(dim=1).float().mean())
            left_on = chosen if setting.concepts == "on" else ranks.d_sae - chosen
            l0 = sizes[setting] / n_tokens
            lines.append(_line(shared, setting, scores[setting], kept=left_on, l0=l0))
        return lines

    def _scores(
        self, parts: Mapping[str, Tensor], flat: Tensor, rows: Tensor, text: Tensor
    ) -> Tensor:
        return self.sets.embed_rows(parts, flat.reshape(rows.shape)).cpu() @ text.t()

    def name_latents(self, sae: Any, latents: np.ndarray) -> list[NearText]:
        """Compare what some concepts add to image embeddings with texts.

        To every token of some test images the concept's direction is added, as long as these tokens are on
        average; the change of the unit embedding, averaged over the images, is compared with the texts'
        differences from their mean.

        Args:
            sae: with `directions`.
            latents: (n,) numbers of the concepts.

        Returns:
            The nearest text of each; nothing without labelled sets.
        """
        names, text = self.sets.prompts()
        sets = list(self.sets.summary["sets"])
        if not sets or not names:
            return []
        parts = next(self.sets.batches(sets[0], "test"))
        rows = self.sets.rows_of(parts)
        length = torch.linalg.vector_norm(rows, dim=-1).mean()
        centred = text - text.mean(0)
        changes = []
        with torch.inference_mode():
            base = unit(self.sets.embed_rows(parts, rows))
            for direction in sae.directions()[torch.as_tensor(latents, device=rows.device)]:
                step = direction / direction.norm().clamp(min=1e-12) * length
                changes.append((unit(self.sets.embed_rows(parts, rows + step)) - base).mean(0))
            return nearest_texts(unit(torch.stack(changes)).cpu(), names, centred)


def nearest_texts(changes: Tensor, names: Sequence[str], texts: Tensor) -> list[NearText]:
    """Find the nearest text of each change, and the cosine that chance reaches.

    A shuffle gives every dimension's values to the texts in another order: each dimension keeps its values, and no text
    its meaning.

    Args:
        changes: (n, d) unit rows.
        names: of the texts.
        texts: (texts, d), less their mean.
    """
    cosines, numbers = (changes @ unit(texts).t()).max(1)
    generator = torch.Generator().manual_seed(0)
    chance = []
    for _ in range(_SHUFFLES):
        order = torch.rand(texts.shape, generator=generator).argsort(0)
        chance.append((changes @ unit(texts.gather(0, order)).t()).amax(1))
    levels = torch.stack(chance).quantile(_CHANCE, dim=0)
    return [
        NearText(names[number], cosine, level)
        for number, cosine, level in zip(
            numbers.tolist(), cosines.tolist(), levels.tolist(), strict=True
        )
    ]


def _line(
    shared: Mapping[str, Any],
    setting: Setting,
    score: Accuracy,
    *,
    kept: float | None = None,
    l0: float | None = None,
) -> dict[str, Any]:
    return {
        **shared,
        "protocol": setting.protocol,
        "labels": setting.labels,
        "concepts": setting.concepts,
        "n": "all" if setting.n is None else setting.n,
        "accuracy": score.mean(),
        "kept": kept,
        "l0": l0,
    }


open_clean = ZeroShot
