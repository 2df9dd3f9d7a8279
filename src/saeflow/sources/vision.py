"""Vision sources: a model looks at images.

Images are decoded once, to the model's own size, when inputs are prepared; the step that runs the model
then reads pixels mapped from disk and never waits for a decoder.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from saeflow.errors import UserError
from saeflow.files import write_json
from saeflow.sources.base import Column, ImageInputs, Inputs, positions
from saeflow.sources.images import NO_LABEL, Item, images_digests, read_images
from saeflow.sources.kinds import InModel, SourceKind
from saeflow.sources.layouts import EMBEDDING, VISION, HookPoint, check_hook_points
from saeflow.sources.model_source import ModelSource
from saeflow.sources.pixels import FACTS, image_facts, write_images
from saeflow.sources.preprocessing import Preprocessing, load_preprocessing, normalised

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)


def check(name: str, params: Mapping[str, Any], folder: Path) -> None:
    """Check hook points as far as they can be told before the model is fetched."""
    check_hook_points(name, params, folder)
    if EMBEDDING in params["hook_points"] and params["tokens"] != "cls":
        raise UserError(
            f"sources.{name}.tokens: expected cls with {EMBEDDING}, which is one vector an image, found "
            f"{params['tokens']}. Set tokens: cls, or make it a source of its own."
        )


def external_inputs(params: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the images."""
    return images_digests(params["images"])


def open_source(params: Mapping[str, Any], folder: Path, device: str) -> "VisionSource":
    """Open the model and the pixels in `folder`."""
    return VisionSource(params, folder, device)


def rows_per_context(params: Mapping[str, Any], preprocessing: Preprocessing) -> int:
    """Rows that each image gives: the CLS token, its patches, or both."""
    down, across = preprocessing.grid
    return {"all": down * across + 1, "cls": 1, "patches": down * across}[params["tokens"]]


def image_positions(tokens: str, prefix: int, hook_points: Sequence[str] | None) -> slice:
    """Positions of the model that give a row.

    Args:
        tokens: of a vision source: all, cls or patches.
        prefix: positions before the first patch.
        hook_points: of the source; an embedding is no position. None where they are not known.

    Raises:
        UserError: tokens that the model does not have.
    """
    is_embedding = hook_points is None or set(hook_points) == {EMBEDDING}
    if prefix == 0 and tokens != "patches" and not (tokens == "cls" and is_embedding):
        raise UserError(
            f"tokens: expected patches, as the model has no CLS token, found {tokens}. Set tokens: patches."
        )
    if prefix > 1 and tokens == "all":
        raise UserError(
            f"tokens: expected cls or patches, as {prefix - 1} register tokens stand between them in this model, found all."
        )
    return slice(prefix, None) if tokens == "patches" else positions({"tokens": tokens})


def prepare_inputs(
    params: Mapping[str, Any],
    rows: Mapping[str, int],
    model: Path,
    folder: Path,
    workers: int = 1,
) -> dict[str, Any]:
    """Decode the images of both splits to the model's size; memory stays bounded.

    An image's own bytes decide its split, so that equal images share one.

    Args:
        params: a vision source.
        rows: rows asked for by split, rounded up to whole images.
        model: the folder that `fetch_model` wrote.
        folder: written, by split: `{split}.npy` (images, height, width, 3) uint8, `{split}.csv` with
            id and label of each, of scenes `{split}_objects.npy` (images,) and `{split}_cover.npy`
            (images, down, across), the class of the object on each patch; and images.json.
        workers: processes that decode.

    Returns:
        What was read, for the record: `images` by split, and `left_out`, how many by the reason.

    Raises:
        UserError: too few images, or too many that cannot be read.
    """
    preprocessing = load_preprocessing(model)
    image_positions(params["tokens"], preprocessing.prefix, params.get("hook_points"))
    wanted = {s: math.ceil(n / rows_per_context(params, preprocessing)) for s, n in rows.items()}
    left_out: Counter[str] = Counter()
    images = read_images(params["images"], left_out)

    def split_of(item: Item) -> str:
        share = int.from_bytes(item.digest[:8], "big") / 2**64
        return "evaluation" if share < params["evaluation_share"] else "train"

    written = write_images(
        images,
        split_of,
        wanted,
        preprocessing,
        params["unreadable_share"],
        workers,
        folder,
        left_out,
    )
    write_json(folder / FACTS, {"classes": images[0], "unreadable": written.unreadable})
    return {"images": written.images, "left_out": dict(left_out)}


class VisionSource(ModelSource):
    """Activations of an image tower at its hook points, image by image.

    Position 0 is the CLS token (or the embedding), position 1 + i the i-th patch, row by row, also where the model has
    no CLS token or has registers.

    Args:
        params: a vision source.
        folder: results/sources/NAME, with model/ and inputs/.
        device: where the model runs.
    """

    def __init__(self, params: Mapping[str, Any], folder: Path, device: str) -> None:
        self.preprocessing = load_preprocessing(folder / "model")
        n_rows = rows_per_context(params, self.preprocessing)
        own = image_positions(params["tokens"], self.preprocessing.prefix, params["hook_points"])
        super().__init__(params, folder, device, own, n_rows)
        self.first_position = positions(params).start or 0
        names = ["label"] + (["objects", "cover"] if "scenes" in params["images"] else [])
        self._names = names
        self.columns: dict[str, Column] = {
            "context": (np.dtype(np.int64), ()),
            "position": (np.dtype(np.int32), ()),
            **{name: (np.dtype(np.int32), ()) for name in names},
        }

    @cached_property
    def d_in(self) -> dict[str, int]:
        """Width of the activations by hook point; what is not the residual stream's is asked of the model."""
        import torch

        from saeflow.sources.hook_points import capture

        found = dict.fromkeys(self.hook_points, self.preprocessing.d_model)
        if others := [name for name in found if not HookPoint.parse(name).is_in_stream]:
            shape = (1, self.preprocessing.height, self.preprocessing.width, 3)
            pixels = torch.zeros(shape, dtype=torch.uint8, device=self.device)
            given = self.model_input(pixels)
            found |= {name: x.shape[-1] for name, x in capture(self.model, others, given).items()}
        return found

    def prove(self, model: "nn.Module") -> None:
        """Count the rows that an image gives; compare sums, neighbours, hidden states and final output of random images."""
        import torch

        from saeflow.sources.hook_points import capture
        from saeflow.sources.proof import prove

        shape = (1, self.preprocessing.height, self.preprocessing.width, 3)
        given = self.model_input(torch.zeros(shape, dtype=torch.uint8, device=self.device))
        for name, x in capture(model, self.hook_points, given).items():
            rows = (x[:, None] if x.ndim == 2 else x)[:, self.positions]
            if rows.shape[:2] != (1, self.rows_per_context) or rows.ndim != 3:
                raise UserError(
                    f"{type(model).__name__}: {name}: expected {self.rows_per_context} rows of an image (image, position, width), "
                    f"found {tuple(x.shape)}. Name another module, or set tokens to what it gives."
                )
        logger.info("hook points proved: %s", prove(model, self.hook_points, VISION))

    def model_input(self, inputs: "Tensor") -> "Tensor":
        """(n, 3, height, width) normalised pixels."""
        return normalised(inputs, self.preprocessing)

    def known(self, split: str, start: int, stop: int) -> dict[str, np.ndarray]:
        """Return each row's class of image; of scenes also its objects and the class of the one it shows."""
        columns = {}
        for name in self._names:
            path = self.folder / "inputs" / f"{split}_{'labels' if name == 'label' else name}.npy"
            values = np.load(path, mmap_mode="r")[start:stop].astype(np.int32)
            if name == "cover":
                patches = values.reshape(len(values), -1)
                before = np.full((len(values), self.preprocessing.prefix), NO_LABEL, np.int32)
                columns[name] = np.concatenate([before, patches], 1)[:, self.positions]
            else:
                columns[name] = np.repeat(values[:, None], self.rows_per_context, axis=1)
        return columns


class VisionInputs(Inputs):
    """Decoded images, with their classes and what scenes show."""

    @property
    def row_groups(self) -> Mapping[str, Literal["first", "rest"]]:
        """CLS tokens and patches, where the stores have both."""
        return {"cls": "first", "patches": "rest"} if self.params["tokens"] == "all" else {}

    def true_counts(self, split: str, contexts: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the number of objects of each scene, at its CLS token."""
        objects = np.load(self.folder / f"{split}_objects.npy")[contexts]
        return contexts, np.zeros_like(contexts), objects.astype(np.float64)

    def known(self, split: str) -> dict[str, Any]:
        """`classes`: their names."""
        return {"classes": image_facts(self.folder)["classes"] or []}

    @cached_property
    def images(self) -> ImageInputs:
        """The images of the evaluation split."""
        grid = load_preprocessing(self.model).grid
        cover = self.folder / "evaluation_cover.npy"
        holds_patches = self.params["tokens"] != "cls"
        return ImageInputs(
            pixels=np.load(self.folder / "evaluation.npy", mmap_mode="r"),
            cover=np.load(cover) if cover.exists() else None,
            grid=grid,
            first=1 if holds_patches else 0,
            patches=grid[0] * grid[1] if holds_patches else 1,
            labels=np.load(self.folder / "evaluation_labels.npy", mmap_mode="r"),
            classes=tuple(image_facts(self.folder)["classes"] or ()),
        )


KIND = SourceKind(
    check=check,
    external_inputs=external_inputs,
    prepare_inputs=prepare_inputs,
    open=open_source,
    inputs=VisionInputs,
    rows_per_context=lambda params: 1 if params["tokens"] == "cls" else None,
    probed_position=lambda params: None if params["tokens"] == "patches" else 0,
    has_true_counts=lambda params: "scenes" in params["images"],
    prepares_in_parallel=True,
    has_images=True,
    in_model=InModel(
        module="saeflow.evaluation.in_model.vision",
        options=("concept_cards",),
        has_labelled_sets=True,
    ),
)
