"""Activations of a model, context by context: what text and vision sources share."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saeflow.errors import UserError
from saeflow.sources.base import Block

if TYPE_CHECKING:
    from torch import Tensor, nn


class ModelSource:
    """A model read at its hook points.

    A kind of source says what the model is given (`model_input`) and what it knows of each row
    (`known`).

    Args:
        params: an entry of `sources`.
        folder: results/sources/NAME, with model/ and inputs/.
        device: where the model runs.
        positions: of each context, those that give a row.
        rows_per_context: how many these are.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        folder: Path,
        device: str,
        positions: slice,
        rows_per_context: int,
    ) -> None:
        self.folder = folder
        self.device = device
        self.hook_points = list(params["hook_points"])
        self.rows_per_context = rows_per_context
        self.positions = positions
        self.first_position = positions.start or 0
        """Number of the first of them in the column `position`."""
        self.forward_batch = int(params["forward_batch"])
        self._inputs: dict[str, np.ndarray] = {}

    def model_input(self, inputs: "Tensor") -> "Tensor":
        """Make the model's input of prepared inputs of some contexts, on the device where they are."""
        raise NotImplementedError

    def known(self, split: str, start: int, stop: int) -> dict[str, np.ndarray]:
        """(contexts, rows_per_context) columns beside `context` and `position`."""
        raise NotImplementedError

    @property
    def d_in(self) -> dict[str, int]:
        """Width of the activations by hook point."""
        raise NotImplementedError

    @cached_property
    def model(self) -> "nn.Module":
        """The model, loaded when it is first needed, and its hook points proved.

        Raises:
            UserError: it lacks a hook point, or one is not what its name says.
        """
        from saeflow.sources.hook_points import check_model
        from saeflow.sources.models import load_model

        model = load_model(self.folder / "model", self.device)
        check_model(model, self.hook_points)
        self.prove(model)
        return model

    def prove(self, model: "nn.Module") -> None:
        """Compare what the hook points give with the model itself, where there is something to compare with."""

    def inputs(self, split: str) -> np.ndarray:
        """(contexts, ...) prepared inputs, mapped from disk.

        Raises:
            UserError: they were not prepared.
        """
        if split not in self._inputs:
            path = self.folder / "inputs" / f"{split}.npy"
            if not path.is_file():
                raise UserError(f"{path}: no such file. Run the step that prepares the inputs.")
            self._inputs[split] = np.load(path, mmap_mode="r")
        return self._inputs[split]

    def n_contexts(self, split: str) -> int:
        """Number of contexts of a split."""
        return len(self.inputs(split))

    def block(self, split: str, start: int, stop: int) -> Block:
        """Activations of contexts [start, stop), in (context, position) order.

        On a GPU the model goes on while activations are copied; `Block.wait` waits for them.

        The model is always called on the same `forward_batch` contexts, so that the bits do not depend on
        how contexts are divided into blocks; it is cheapest when `start` is a multiple of `forward_batch`.
        """
        import torch

        from saeflow.sources.copies import Copies
        from saeflow.sources.hook_points import capture

        inputs = self.inputs(split)
        if not 0 <= start < stop <= len(inputs):
            raise ValueError(
                f"contexts: expected a range within 0..{len(inputs)}, found {start}..{stop}"
            )
        shape = (stop - start, self.rows_per_context)
        copies = Copies(self.device)
        activations: dict[str, Tensor] = {}
        batch = self.forward_batch
        for begin in range(start // batch * batch, stop, batch):
            prepared = torch.from_numpy(np.array(inputs[begin : begin + batch]))
            given = self.model_input(copies.to_device(prepared))
            low, high = max(start, begin), min(stop, begin + batch)
            for name, x in capture(self.model, self.hook_points, given).items():
                by_position = x[:, None] if x.ndim == 2 else x
                kept = by_position[low - begin : high - begin, self.positions]
                if name not in activations:
                    activations[name] = copies.host_memory((*shape, x.shape[-1]), x.dtype)
                copies.to_host(kept, activations[name][low - start : high - start])
        columns: dict[str, np.ndarray] = {
            "context": np.repeat(np.arange(start, stop, dtype=np.int64), shape[1]),
            "position": np.tile(
                np.arange(shape[1], dtype=np.int32) + self.first_position, shape[0]
            ),
            **{
                name: np.ascontiguousarray(values).reshape(-1)
                for name, values in self.known(split, start, stop).items()
            },
        }
        rows = {name: x.reshape(-1, x.shape[-1]) for name, x in activations.items()}
        return Block(rows, columns, copies.when_done())
