"""A kind of source that saeflow does not have: tones, heard by a linear "model" that tells loud from quiet.

Everything that a new kind touches stands here: its record, its source, its inputs and its model in the loop.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeflow.evaluation.in_model import InModelResult, NearText
from saeflow.sources import Block, Inputs, SourceKind
from saeflow.sources.base import Column
from saeflow.sources.kinds import InModel

FRAMES, WIDTH, HOOK_POINT = 5, 6, "blocks.0.out"


def prepare_inputs(
    params: Mapping[str, Any], rows: Mapping[str, int], model: Path, folder: Path, workers: int = 1
) -> dict[str, Any]:
    """(contexts, FRAMES) loudness of each split, and the weights that hear it."""
    for number, (split, count) in enumerate(rows.items()):
        loudness = np.random.default_rng(number).random((-(-count // FRAMES), FRAMES))
        np.save(folder / f"{split}.npy", loudness.astype(np.float32))
    model.mkdir(exist_ok=True)
    np.save(model / "weights.npy", np.random.default_rng(9).normal(size=(2, WIDTH)))
    return {}


class Audio:
    """Each frame is its loudness and its square in WIDTH directions."""

    hook_points = [HOOK_POINT]  # noqa: RUF012
    d_in = {HOOK_POINT: WIDTH}  # noqa: RUF012
    rows_per_context = FRAMES
    columns: dict[str, Column] = {  # noqa: RUF012
        "context": (np.dtype(np.int64), ()), "position": (np.dtype(np.int32), ()),
        "loud": (np.dtype(np.int32), ()),
    }  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = np.load(folder / "model/weights.npy")

    def heard(self, split: str) -> np.ndarray:
        return np.load(self.folder / "inputs" / f"{split}.npy")

    def n_contexts(self, split: str) -> int:
        return len(self.heard(split))

    def block(self, split: str, start: int, stop: int) -> Block:
        loudness = self.heard(split)[start:stop].reshape(-1).astype(np.float64)
        x = np.stack([loudness, loudness**2], axis=1) @ self.weights
        columns: dict[str, np.ndarray] = {
            "context": np.repeat(np.arange(start, stop), FRAMES),
            "position": np.tile(np.arange(FRAMES, dtype=np.int32), stop - start),
            "loud": (loudness > 0.5).astype(np.int32),
        }
        return Block({HOOK_POINT: torch.tensor(x, dtype=torch.float32)}, columns)


class AudioInputs(Inputs):
    """Return the facts known of frames."""

    @property
    def row_groups(self) -> Mapping[str, Any]:
        return {"onset": "first", "rest": "rest"}

    def known(self, split: str) -> dict[str, Any]:
        return {"questions": {"loud": "loud"}}


class Loudness:
    """The loudness that the model's weights read from a reconstruction, against the clean one."""

    def __init__(self, clean: Path, model_folder: Path, device: str) -> None:
        self.clean = json.loads((clean / "clean.json").read_text())
        self.folder = model_folder

    @cached_property
    def model(self) -> Any:
        return torch.tensor(np.load(self.folder / "weights.npy"), dtype=torch.float32)

    def measure(self, sae: Any, *, is_trained: bool) -> InModelResult:
        with torch.inference_mode():
            x = torch.tensor(self.clean["x"])
            heard = (sae.forward(x) @ torch.linalg.pinv(self.model))[:, 0]
        difference = heard - torch.tensor(self.clean["loudness"])
        return InModelResult({"loudness_error": float(difference.abs().mean())})

    def name_latents(self, sae: Any, latents: np.ndarray) -> list[NearText]:
        return []


open_clean = Loudness


def write_clean(
    source: Mapping[str, Any],
    folder: Path,
    hook_point: str,
    mean: torch.Tensor,
    settings: Mapping[str, Any],
    labelled: Mapping[str, Path],
    device: str,
    out: Path,
) -> None:
    """The first frames of the evaluation split and their loudness."""
    audio = Audio(folder)
    x = audio.block("evaluation", 0, settings["heard"]).activations[hook_point]
    loudness = audio.heard("evaluation")[: settings["heard"]].reshape(-1)
    (out / "clean.json").write_text(json.dumps({"x": x.tolist(), "loudness": loudness.tolist()}))


KIND = SourceKind(
    check=lambda name, params, folder: None,
    external_inputs=lambda params: {},
    prepare_inputs=prepare_inputs,
    open=lambda params, folder, device: Audio(folder),
    inputs=AudioInputs,
    rows_per_context=lambda params: FRAMES,
    in_model=InModel(module=__name__, options=("heard",)),
)
