"""Zero-shot classification of images through all, or only a few, of an SAE's concepts.

Each image becomes the class whose text it is nearest to, by cosine; an accuracy is the mean over classes
of the share of their images that are right. The text of a class is the mean of its unit text embeddings
over the templates.

Top-n protocols: a class's concepts are ranked by how many tokens of its images they
fire on. `paper` (arXiv:2604.14925 and its released code) ranks on the images that are scored, counts
activations above 0.2, and leaves each image the concepts of its own, true class. `leak_free` ranks on
training images, counts activations that are not 0, and gives every image the same concepts, the union of
all classes' top n.

With `permuted` labels, images bear the labels of others, and nothing can be known about them. Leak-free
accuracy (concepts ranked with permuted labels too) must be at chance. The paper's protocol then shows of
each image the concepts of a class that it is not of; accuracy above chance is what the mask itself gives
away.

The model's clean side and every token's activation at the hook point are computed once a hook point
(`write_labelled`); an SAE's latents once an image, for all settings.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeflow.errors import UserError
from saeflow.files import read_json, write_json
from saeflow.operators import SparseLatents
from saeflow.progress import progress
from saeflow.sources.base import positions
from saeflow.sources.copies import Copies
from saeflow.sources.hook_points import HookPoint, capture, resume_at, run_from
from saeflow.sources.layouts import EMBEDDING
from saeflow.sources.models import load_config, load_model, load_tokenizer
from saeflow.sources.preprocessing import load_preprocessing, normalised
from saeflow.sources.vision import image_facts

logger = logging.getLogger(__name__)

COUNTS = (1, 5, 10, 50)
"""n of the top-n protocols; beside them `all` concepts."""
PAPER_THRESHOLD = 0.2
SETS = "labelled.json"
SETS_FOLDER, TEXT = "sets", "text.safetensors"
_TEXTS_AT_ONCE = 256


# The clean side.


def text_features(model: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Unit text embeddings (prompts, d_embedding) float32 on the CPU.

    Raises:
        UserError: the model has no text tower.
    """
    if not hasattr(model, "get_text_features"):
        raise UserError(
            f"{type(model).__name__}: expected a CLIP model with a text tower, found none; zero-shot "
            "classification needs one. Choose another model, or set evaluation.labelled_sets: {}."
        )
    found = []
    length = model.config.text_config.max_position_embeddings
    device = next(model.parameters()).device
    with torch.inference_mode():
        for start in range(0, len(prompts), _TEXTS_AT_ONCE):
            given = tokenizer(
                list(prompts[start : start + _TEXTS_AT_ONCE]),
                padding=True, truncation=True, max_length=length, return_tensors="pt",
            ).to(device)  # fmt: skip
            features = model.get_text_features(**given).pooler_output.float().cpu()
            found.append(_unit(features))
    return torch.cat(found)


def class_features(
    model: Any, tokenizer: Any, classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """(classes, d_embedding) unit mean of each class's text embeddings over the templates."""
    prompts = [template.format(name) for name in classes for template in templates]
    features = text_features(model, tokenizer, prompts)
    return _unit(features.view(len(classes), len(templates), -1).mean(1))


def write_labelled(
    source: Mapping[str, Any],
    folder: Path,
    labelled: Mapping[str, Path],
    prompts: Sequence[str],
    hook_point: str,
    device: str,
    out: Path,
) -> None:
    """Run the model on every labelled set and keep what every SAE is measured on.

    Args:
        source: the source's parameters.
        folder: the source's folder, with model/.
        labelled: by name, the folders that `prepare_labelled` wrote.
        prompts: texts that concepts are compared with.
        hook_point: where the SAEs read.
        device: where the model runs.
        out: written: a folder sets/NAME for each set, with text.safetensors (features of the classes) and
            {train|test}-NNNNN.safetensors with activation (n, position, d_in), labels (n,) and, where the
            hook's block must run, block_input; prompts.safetensors; labelled.json.
    """
    model: Any = load_model(folder / "model", device)
    tokenizer = load_tokenizer(folder / "model")
    preprocessing = load_preprocessing(folder / "model")
    names = [hook_point]
    if hook_point != EMBEDDING and resume_at(model, hook_point) is None:
        names.append(str(HookPoint.parse(hook_point).block_input))
    facts: dict[str, Any] = {}
    copies = Copies(device)
    for name, images in labelled.items():
        known = image_facts(images)
        text = class_features(model, tokenizer, known["classes"], known["templates"])
        own = out / SETS_FOLDER / name
        own.mkdir(parents=True)
        save_file({"text": text}, own / TEXT)
        score = Accuracy(len(known["classes"]))
        for split in ("train", "test"):
            pixels = np.load(images / f"{split}.npy", mmap_mode="r")
            labels = torch.from_numpy(np.load(images / f"{split}_labels.npy")).long()
            size = source["forward_batch"]
            starts = range(0, len(pixels), size)
            for number, start in enumerate(progress(starts, f"{name}: {split}", "batch")):
                stored = copies.to_device(torch.from_numpy(np.array(pixels[start : start + size])))
                given = normalised(stored, preprocessing)
                found = capture(model, names, given)
                parts = {"activation": found[hook_point], "labels": labels[start : start + size]}
                if len(names) > 1:
                    parts["block_input"] = found[names[1]]
                if split == "test":
                    clean = embed(model, hook_point, parts, parts["activation"])
                    score.add(clean.cpu() @ text.t(), parts["labels"])
                save_file(
                    {key: part.cpu().contiguous() for key, part in parts.items()},
                    own / f"{split}-{number:05d}.safetensors",
                )
        facts[name] = {
            "classes": known["classes"],
            "train_images": known["train_images"],
            "test_images": known["test_images"],
            "accuracy": score.mean(),
        }
        logger.info("%s: zero-shot accuracy %.3f of %d classes", name, score.mean(), len(text))
    if prompts:
        save_file({"text": text_features(model, tokenizer, prompts)}, out / "prompts.safetensors")
    width = int(load_config(folder / "model").projection_dim)
    write_json(
        out / SETS,
        {
            "hook_point": hook_point, "sets": facts, "prompts": list(prompts), "tokens": source["tokens"],
            "d_embedding": width,
        },
    )  # fmt: skip


def embed(model: Any, hook_point: str, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Image embeddings (n, d_embedding) float32 with `x` at the hook point.

    Args:
        parts: of some images; `block_input`, where the hook's block must run.
        x: (n, position, d_in), or (n, d_embedding) at the embedding.
    """
    if hook_point == EMBEDDING:
        return x.float()
    resumed = resume_at(model, hook_point)
    if resumed is None:
        return run_from(model, hook_point, parts["block_input"], None, lambda _: x).float()
    return run_from(model, resumed, x, None, lambda block_input: block_input).float()


def _unit(rows: Tensor) -> Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1e-12)


class Accuracy:
    """Mean over classes of the share of their images that are right."""

    def __init__(self, n_classes: int) -> None:
        self.right = torch.zeros(n_classes, dtype=torch.int64)
        self.total = torch.zeros(n_classes, dtype=torch.int64)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Add images by their scores (n, classes); ties go to the lower class."""
        right = scores.argmax(1) == labels
        self.right += torch.bincount(labels[right], minlength=len(self.right))
        self.total += torch.bincount(labels, minlength=len(self.total))

    def mean(self) -> float:
        """The accuracy over classes that have images."""
        seen = self.total > 0
        return float((self.right[seen] / self.total[seen]).double().mean())


# The SAE's side.


@dataclass(frozen=True)
class Setting:
    """One way to leave an image a few concepts."""

    protocol: str  # paper, leak_free
    labels: str  # true, permuted
    concepts: str  # on: only the top n are left; off: all but these
    n: int | None  # None: all


class LabelledSets:
    """Labelled sets of one source and hook point, as `write_labelled` left them.

    Args:
        clean: its folder.
        model_folder: the source's model.
        device: where the model and the SAEs run.
    """

    def __init__(self, clean: Path, model_folder: Path, device: str) -> None:
        self.folder, self.device = clean, device
        self.summary = read_json(clean / SETS)
        self.model: Any = load_model(model_folder, device)
        self.positions = positions(self.summary)
        self.hook_point: str = self.summary["hook_point"]

    def _files(self, name: str, split: str) -> list[Path]:
        """A set's batches in order; each set has a folder of its own, so that no name is part of another."""
        found = (self.folder / SETS_FOLDER / name).glob(f"{split}-*.safetensors")
        return sorted(found, key=lambda path: int(path.stem.removeprefix(f"{split}-")))

    def batches(self, name: str, split: str) -> Iterator[dict[str, Tensor]]:
        """The images of a set, some at a time."""
        for path in self._files(name, split):
            yield load_file(path, device=self.device)

    def labels(self, name: str, split: str) -> Tensor:
        """(images,) class of every image of a set, without reading its activations."""
        found = []
        for path in self._files(name, split):
            with safe_open(path, framework="pt") as file:
                found.append(file.get_tensor("labels"))
        return torch.cat(found)

    def prompts(self) -> tuple[list[str], Tensor]:
        """Texts that concepts are compared with, and their unit embeddings.

        Without prompts of their own, the names of all classes.
        """
        if self.summary["prompts"]:
            return self.summary["prompts"], load_file(self.folder / "prompts.safetensors")["text"]
        sets = self.summary["sets"]
        names = [name for known in sets.values() for name in known["classes"]]
        texts = [load_file(self.folder / SETS_FOLDER / name / TEXT)["text"] for name in sets]
        return names, torch.cat(texts) if texts else torch.zeros(0, self.summary["d_embedding"])

    def name_concepts(self, sae: Any, latents: np.ndarray) -> list[tuple[str, float]]:
        """What some concepts add to image embeddings, compared with texts.

        To every token of some test images the concept's direction is added, as long as these tokens are on
        average; the change of the unit embedding, averaged over the images, is compared with the texts'
        differences from their mean.

        Args:
            sae: with `directions`.
            latents: (n,) numbers of the concepts.

        Returns:
            The nearest text of each, and its cosine; nothing without labelled sets.
        """
        names, text = self.prompts()
        sets = list(self.summary["sets"])
        if not sets or not names:
            return []
        parts = next(self.batches(sets[0], "test"))
        rows = self.rows_of(parts)
        length = torch.linalg.vector_norm(rows, dim=-1).mean()
        centred = _unit(text - text.mean(0))
        found = []
        with torch.inference_mode():
            base = _unit(self.embed_rows(parts, rows))
            for direction in sae.directions()[torch.as_tensor(latents, device=rows.device)]:
                step = direction / direction.norm().clamp(min=1e-12) * length
                change = (_unit(self.embed_rows(parts, rows + step)) - base).mean(0)
                near = _unit(change[None]).cpu() @ centred.t()
                found.append((names[int(near.argmax())], float(near.max())))
        return found

    def rows_of(self, parts: Mapping[str, Tensor]) -> Tensor:
        """(n, tokens, d_in) float32, the activations that the source's stores hold."""
        x = parts["activation"].float()
        return x[:, None] if x.ndim == 2 else x[:, self.positions]

    def embed_rows(self, parts: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """Image embeddings with `rows` (n, tokens, d_in) in place of `rows_of`."""
        x = parts["activation"]
        if x.ndim == 2:
            return embed(self.model, self.hook_point, parts, rows[:, 0])
        spliced = x.clone()
        spliced[:, self.positions] = rows.to(x.dtype)
        return embed(self.model, self.hook_point, parts, spliced)

    def evaluate(self, sae: Any, *, top_n: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Accuracy with an SAE in the model.

        Args:
            sae: `encode`, `decode` and, for top-n, `decode_selected`; on the device.
            top_n: classify through a few concepts too.

        Returns:
            The metrics of zero-shot classification; one line per set and setting.
        """
        lines: list[dict[str, Any]] = []
        spliced, clean, chance = [], [], []
        with torch.inference_mode():
            for name, known in self.summary["sets"].items():
                found = self._evaluate_set(sae, name, known, top_n)
                spliced.append(found[0]["accuracy"])
                clean.append(known["accuracy"])
                chance.append(1 / len(known["classes"]))
                lines += found
        if not lines:
            return {}, []
        metrics = {
            "zero_shot_clean": float(np.mean(clean)),
            "zero_shot": float(np.mean(spliced)),
            "zero_shot_chance": float(np.mean(chance)),
        }
        return metrics, lines

    def _evaluate_set(
        self, sae: Any, name: str, known: Mapping[str, Any], top_n: bool
    ) -> list[dict[str, Any]]:
        text = load_file(self.folder / SETS_FOLDER / name / TEXT)["text"]
        n_classes = len(text)
        shared = {
            "set": name, "classes": n_classes, "images": known["test_images"],
            "clean_accuracy": known["accuracy"],
        }  # fmt: skip
        whole = Accuracy(n_classes)
        if not top_n:
            for parts in self.batches(name, "test"):
                rows = self.rows_of(parts)
                flat = sae.forward(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)
                whole.add(self.embed_rows(parts, flat).cpu() @ text.t(), parts["labels"].cpu())
            return [_line(shared, Setting("all", "true", "on", None), whole, None)]
        with tempfile.TemporaryDirectory() as temporary:
            spool = Path(temporary)
            ranks = self._rank(sae, name, n_classes, spool)
            masks = _masks(ranks)
            scores = {setting: Accuracy(n_classes) for setting in masks}
            sizes = dict.fromkeys(masks, 0.0)
            start = 0
            for parts, latents in self._spooled(name, spool, ranks.d_sae):
                labels = parts["labels"].cpu()
                permuted = ranks.permuted[start : start + len(labels)]
                start += len(labels)
                rows = self.rows_of(parts)
                full = sae.decode_selected(latents)
                nothing = sae.decode_selected(latents.with_values(latents.values * 0))
                whole.add(self._scores(parts, full, rows, text), labels)
                tokens = rows.shape[1]
                for setting, mask in masks.items():
                    own = labels if setting.labels == "true" else permuted
                    kept = _kept(latents, mask.to(latents.columns.device), own, tokens)
                    part = sae.decode_selected(latents.with_values(latents.values * kept))
                    x_hat = part if setting.concepts == "on" else full - part + nothing
                    scores[setting].add(self._scores(parts, x_hat, rows, text), own)
                    sizes[setting] += float(kept.sum())
        lines = [_line(shared, Setting("all", "true", "on", None), whole, None)]
        n_tokens = known["test_images"] * tokens
        lines += [
            _line(shared, setting, scores[setting], sizes[setting] / n_tokens) for setting in masks
        ]
        return lines

    def _scores(
        self, parts: Mapping[str, Tensor], flat: Tensor, rows: Tensor, text: Tensor
    ) -> Tensor:
        return self.embed_rows(parts, flat.reshape(rows.shape)).cpu() @ text.t()

    def _rank(self, sae: Any, name: str, n_classes: int, spool: Path) -> "_Ranks":
        """Encode every image once: count what fires for each class, keep the test images' latents."""
        counts: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        for split in ("train", "test"):
            every = self.labels(name, split)
            permuted = every[torch.randperm(len(every), generator=generator)]
            start = 0
            for number, parts in enumerate(self.batches(name, split)):
                rows = self.rows_of(parts)
                dense = sae.encode(rows.reshape(-1, rows.shape[-1]))
                latents = SparseLatents.from_dense(dense)
                n_images = len(rows)
                image_of = latents.rows // rows.shape[1]
                fires = latents.values > PAPER_THRESHOLD if split == "test" else latents.values != 0
                kinds = {"true": every} | ({"permuted": permuted} if split == "train" else {})
                for kind, of_images in kinds.items():
                    own = of_images[start : start + n_images].to(image_of.device)[image_of[fires]]
                    flat = own * dense.shape[1] + latents.columns[fires]
                    counted = torch.bincount(flat, minlength=n_classes * dense.shape[1])
                    key = f"{split}-{kind}"
                    counts[key] = counts.get(key, 0) + counted.cpu()
                start += n_images
                if split == "test":
                    save_file(
                        {
                            "offsets": latents.offsets.cpu(),
                            "columns": latents.columns.to(torch.int32).cpu(),
                            "values": latents.values.cpu(),
                        },
                        spool / f"{number:05d}.safetensors",
                    )
        d_sae = dense.shape[1]
        shaped = {key: count.view(n_classes, d_sae) for key, count in counts.items()}
        return _Ranks(shaped, permuted, d_sae)  # of the test images, which come last

    def _spooled(
        self, name: str, spool: Path, d_sae: int
    ) -> Iterator[tuple[dict[str, Tensor], SparseLatents]]:
        for number, parts in enumerate(self.batches(name, "test")):
            held = load_file(spool / f"{number:05d}.safetensors", device=self.device)
            latents = SparseLatents(held["offsets"], held["columns"].long(), held["values"], d_sae)
            yield parts, latents


@dataclass(frozen=True)
class _Ranks:
    counts: Mapping[
        str, Tensor
    ]  # by split and labels: (classes, d_sae) tokens that a concept fires on
    permuted: Tensor  # (test images,) permuted labels
    d_sae: int


def top_concepts(counts: Tensor, n: int) -> Tensor:
    """(classes, d_sae) bool: each class's n most frequent concepts, ties to the lower index.

    Concepts that never fire for a class are none of its own.
    """
    order = counts.sort(dim=1, descending=True, stable=True).indices[:, :n]
    mask = torch.zeros_like(counts, dtype=torch.bool)
    mask.scatter_(1, order, True)
    return mask & (counts > 0)


def _masks(ranks: _Ranks) -> dict[Setting, Tensor]:
    """What each setting leaves on: (classes, d_sae) by true class, or (1, d_sae) for every image."""
    masks: dict[Setting, Tensor] = {}
    for labels in ("true", "permuted"):
        for n in COUNTS:
            paper = top_concepts(ranks.counts["test-true"], n)
            shared = top_concepts(ranks.counts[f"train-{labels}"], n).any(0, keepdim=True)
            for protocol, mask in (("paper", paper), ("leak_free", shared)):
                for concepts in ("on", "off") if labels == "true" else ("on",):
                    masks[Setting(protocol, labels, concepts, n)] = mask
    return masks


def _kept(latents: SparseLatents, mask: Tensor, labels: Tensor, tokens: int) -> Tensor:
    """(count,) 1 where the mask leaves a latent on, else 0."""
    if len(mask) == 1:
        return mask[0][latents.columns].to(latents.values.dtype)
    image_of = latents.rows // tokens
    own = labels.to(image_of.device)[image_of]
    return mask[own, latents.columns].to(latents.values.dtype)


def _line(
    shared: Mapping[str, Any], setting: Setting, score: Accuracy, per_token: float | None
) -> dict[str, Any]:
    return {
        **shared,
        "protocol": setting.protocol,
        "labels": setting.labels,
        "concepts": setting.concepts,
        "n": "all" if setting.n is None else setting.n,
        "accuracy": score.mean(),
        "l0": per_token,
    }
