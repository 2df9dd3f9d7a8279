"""The one trainer: any variant, one or several SAEs of a store in one pass over its shuffled batches."""

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from saeflow.config import SAEConfig
from saeflow.progress import progress
from saeflow.saes import Ranks
from saeflow.training.clock import shares
from saeflow.training.memory import keep_freed_memory
from saeflow.training.rows import Batches
from saeflow.training.run import Run
from saeflow.training.stacked import units


class Trained(NamedTuple):
    """A run at its end."""

    content: dict[str, str]  # digests: of the weights, and of what steps.csv says besides speed
    share: float  # of the time of all runs that were trained together


def train(
    store: Batches,
    config: SAEConfig,
    runtime: Mapping[str, Any],
    folder: Path,
    probe: Path | None = None,
) -> dict[str, str]:
    """Train one SAE, going on from a checkpoint in `folder` if there is one.

    Args:
        store: training activations.
        config: the run.
        runtime: device, precision, checkpoint_every_s; and `logging`, see `Live`, where the run is to be
            watched.
        folder: written: weights.safetensors, config.json, steps.csv.
        probe: folder of a fitted complexity probe, where the run's options name one.

    Returns:
        Content digests: of the weights, and of what steps.csv says besides speed.

    Raises:
        UserError: options that do not fit, a loss that is not finite, a checkpoint that is damaged
            or of another run.
        SystemExit: 128 + the signal's number, after SIGTERM or SIGINT and a last checkpoint.
    """
    (trained,) = train_group(store, [(config, folder, probe)], runtime)
    return trained.content


def train_group(
    store: Batches,
    wanted: Sequence[tuple[SAEConfig, Path, Path | None]],
    runtime: Mapping[str, Any],
    ranks: Ranks | None = None,
) -> list[Trained]:
    """`train` for several SAEs of one store, in one pass over its batches; equal to separate training.

    Runs with the same batch size, seed and kind of rows take the same batches, each of which is read
    once.

    Args:
        store, runtime: as for `train`.
        wanted: config, folder and probe of each run.
        ranks: this process among others that call this alike; only the first of them writes.

    Returns:
        Of each run, its content digests and its share of the time.
    """
    runs = _advanced(store, wanted, runtime, ranks)
    parts = shares([run.clock for run in runs])
    return [Trained(run.finish(), part) for run, part in zip(runs, parts, strict=True)]


def train_part(
    store: Batches,
    wanted: Sequence[tuple[SAEConfig, Path, Path | None]],
    runtime: Mapping[str, Any],
    ranks: Ranks | None = None,
) -> list[float]:
    """Train several SAEs as far as the store's batches go, and leave a checkpoint of each; otherwise as `train_group`.

    Returns:
        Of each run, its share of the time.
    """
    runs = _advanced(store, wanted, runtime, ranks)
    for run in runs:
        run.checkpoint()
    return shares([run.clock for run in runs])


def _advanced(
    store: Batches,
    wanted: Sequence[tuple[SAEConfig, Path, Path | None]],
    runtime: Mapping[str, Any],
    ranks: Ranks | None,
) -> list[Run]:
    """Runs after all steps that the store has batches for."""
    keep_freed_memory()
    ranks = ranks or Ranks()
    runs = [Run(store, config, runtime, folder, probe, ranks) for config, folder, probe in wanted]
    try:
        if left := [run for run in runs if run.step < run.total]:
            with stop_signals() as stopped:
                advance(left, stopped)
    finally:
        for run in runs:
            if run.live is not None:
                run.live.close()
    return runs


def advance(runs: Sequence[Run], stopped: Sequence[int] = ()) -> None:
    """Take all steps that are left and that there are batches for, every batch once.

    Args:
        runs: of one store.
        stopped: signals that came; the first ends this after the step, with checkpoints.
    """
    saved = time.monotonic()
    every_s, ranks = runs[0].runtime["checkpoint_every_s"], runs[0].ranks
    is_apart = ranks.size > 1 and runs[0].device.type == "cuda"  # agreeing is a wait for the device
    left = streams(runs)
    while left:
        sharing = left.pop(0)
        numbers = range(min(run.step for run in sharing), max(run.total for run in sharing))
        names = sharing[0].config.name if len(sharing) == 1 else f"{len(sharing)} SAEs"
        together = units(sharing)
        with closing(sharing[0].raw_batches(numbers.start)) as batches:
            for number in progress(numbers, f"training {names}", "step"):
                began = time.monotonic()
                batch = next(batches, None)
                if batch is None:  # the last of this window
                    break
                taking = sum(run.step == number < run.total for run in sharing)
                waited = (time.monotonic() - began) / max(1, taking)
                for unit in together:
                    if unit.step == number < unit.total:
                        unit.take(batch, waited)
                if is_apart and (number + 1) % sharing[0].config.training.log_every_steps:
                    continue
                is_due = time.monotonic() - saved > every_s
                signal_number, is_due = ranks.agree(stopped[0] if stopped else 0, is_due)
                if signal_number or is_due:
                    for run in sharing:
                        run.checkpoint()
                    saved = time.monotonic()
                if signal_number:
                    raise SystemExit(128 + signal_number)
        if left:
            for run in sharing:
                run.checkpoint()


def streams(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs by the stream of batches that they train on."""
    found: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(run.stream, []).append(run)
    return list(found.values())


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT are put in; a second one ends the process at once."""
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped  # only the main thread can be told of signals
        return

    def stop(number: int, frame: object) -> None:
        if stopped:
            raise SystemExit(128 + number)
        stopped.append(number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
