"""The interface of every source of activations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Column = tuple[np.dtype, tuple[int, ...]]
"""dtype and trailing shape of a column."""


@dataclass(frozen=True)
class Block:
    """Rows of some contexts, in (context, position) order."""

    activations: "dict[str, Tensor]"
    """By hook point: (rows, d_in) on the CPU, in the dtype of what computed them; whole after `wait`."""
    columns: dict[str, np.ndarray]
    """By name: (rows, ...), which input each row came from and, where known, its truth."""
    wait: Callable[[], None] = lambda: None
    """Returns when the activations have arrived from the device; on a CPU at once."""


_TOKENS = {"all": slice(0, None), "cls": slice(0, 1), "patches": slice(1, None)}


def positions(params: Mapping[str, Any]) -> slice:
    """Positions of each context of a source that give a row.

    Args:
        params: one entry of `sources`.
    """
    if "tokens" in params:
        return _TOKENS[params["tokens"]]
    return slice(int(params.get("skip_first", False)), None)


def generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """A generator of its own (counter-based) for each block of each stream of a seed."""
    sequence = np.random.SeedSequence(seed, spawn_key=(stream, number))
    return np.random.Generator(np.random.Philox(sequence))


class Source(Protocol):
    """Activations of contexts; each context gives `rows_per_context` rows."""

    @property
    def hook_points(self) -> list[str]: ...

    @property
    def d_in(self) -> dict[str, int]: ...

    @property
    def rows_per_context(self) -> int: ...

    @property
    def columns(self) -> dict[str, Column]: ...

    def n_contexts(self, split: str) -> int:
        """Number of contexts of a split."""
        ...

    def block(self, split: str, start: int, stop: int) -> Block:
        """Activations of contexts [start, stop); the same bits in whatever pieces they are asked for."""
        ...


@dataclass(frozen=True)
class ImageInputs:
    """Images of the evaluation split and where their rows lie.

    Attributes:
        pixels: (images, height, width, 3) uint8, mapped from disk.
        cover: (images, down, across) class of the object on each patch, -1 for none; None where it is not known.
        grid: patches down and across.
        first: position of the first patch.
        patches: patches of an image that the stores hold; 1 where a row stands for the whole image.
        labels: (images,) class of each, -1 for none.
        classes: names of the classes; empty where they have none.
    """

    pixels: np.ndarray
    cover: np.ndarray | None
    grid: tuple[int, int]
    first: int
    patches: int
    labels: np.ndarray
    classes: tuple[str, ...]

    def title(self, image: int) -> str:
        """Return the name of an image's class, its number where it has no name, nothing where there is no class."""
        label = int(self.labels[image])
        if label < 0:
            return ""
        return self.classes[label] if self.classes else f"class {label}"


class Inputs:
    """Prepared inputs of a source and what is known of its rows beside the store's columns.

    A kind of source overrides what it knows; the defaults know nothing.

    Args:
        params: an entry of `sources`.
        folder: results/sources/NAME/inputs, as `prepare_inputs` wrote it.
        model: the folder of the source's model.
    """

    def __init__(self, params: Mapping[str, Any], folder: Path, model: Path) -> None:
        self.params, self.folder, self.model = params, folder, model

    @property
    def row_groups(self) -> Mapping[str, Literal["first", "rest"]]:
        """Groups of rows that are also measured apart, by name: the first position of a context, or the rest."""
        return {}

    @property
    def true_features(self) -> np.ndarray | None:
        """(n_features, d_in) true dictionary."""
        return None

    def true_counts(self, split: str, contexts: np.ndarray) -> tuple[np.ndarray, ...]:
        """Context, position and number of true features or objects of the rows that probes read, (rows,) each."""
        raise NotImplementedError

    def n_contexts(self, split: str) -> int:
        """Number of contexts of a split."""
        return len(np.load(self.folder / f"{split}.npy", mmap_mode="r"))

    def units(self, split: str) -> np.ndarray:
        """(contexts,) numbers of what contexts are drawn together with in intervals: each is one by itself."""
        return np.arange(self.n_contexts(split))

    def tokens(self, split: str) -> np.ndarray | None:
        """(contexts, length) token ids of a text, mapped from disk."""
        return None

    def known(self, split: str) -> dict[str, Any]:
        """Facts that questions about rows are made of, see `saeflow.evaluation.tasks.tasks`."""
        return {}

    @property
    def images(self) -> ImageInputs | None:
        """The images of the evaluation split."""
        return None
