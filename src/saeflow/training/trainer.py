"""The one trainer: any variant, from a store's shuffled batches to saved weights."""

import csv
import dataclasses
import io
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from saeflow.complexity.files import PROBE
from saeflow.config import SAEConfig, TrainingConfig
from saeflow.errors import UserError
from saeflow.files import atomic_file, file_digest, json_digest
from saeflow.operators import acts_as_gpu
from saeflow.progress import progress
from saeflow.saes import SAE, Forward, InputScale, Ranks, build, save
from saeflow.saes.ranks import check_divides
from saeflow.stores.batches import on_device
from saeflow.training.checkpoints import (
    checkpoints,
    delete_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from saeflow.training.finite import NotFinite, Watch
from saeflow.training.graphs import Replayed, capture_cuda
from saeflow.training.live import Live
from saeflow.training.memory import keep_freed_memory
from saeflow.training.optimizer import Optimizer

logger = logging.getLogger(__name__)

STEPS = "steps.csv"
_TIMED = ("tokens_per_s",)
_LR_AUTO, _LR_AUTO_WIDTH = 2e-4, 2**14  # Gao et al. 2024, scaled as 1/sqrt(d_sae)


class Shuffled(Protocol):
    """Rows in endless shuffled batches."""

    def batches(
        self, batch_size: int, seed: int, start_batch: int = 0, *, pin: bool = False
    ) -> Iterator[Tensor]:
        """Endless shuffled batches (B, d_in), from any number on; dropped when done with."""
        ...


class Batches(Shuffled, Protocol):
    """The interface that the trainer needs of a store."""

    d_in: int
    scale: float
    mean: Tensor
    model: str | None

    @property
    def positions(self) -> slice:
        """Of each context, those that give a row."""
        ...

    def last_rows(self) -> Shuffled:
        """Each context's last row alone."""
        ...


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
    (digests,) = train_group(store, [(config, folder, probe)], runtime)
    return digests


def train_group(
    store: Batches,
    wanted: Sequence[tuple[SAEConfig, Path, Path | None]],
    runtime: Mapping[str, Any],
    ranks: Ranks | None = None,
) -> list[dict[str, str]]:
    """`train` for several SAEs of one store, in one pass over its batches; equal to separate training.

    Runs with the same batch size, seed and kind of rows take the same batches, each of which is read
    once.

    Args:
        store, runtime: as for `train`.
        wanted: config, folder and probe of each run.
        ranks: this process among others that call this alike; only the first of them writes.
    """
    keep_freed_memory()
    ranks = ranks or Ranks()
    runs = [Run(store, config, runtime, folder, probe, ranks) for config, folder, probe in wanted]
    try:
        with stop_signals() as stopped:
            advance(runs, stopped)
    finally:
        for run in runs:
            if run.live is not None:
                run.live.close()
    return [run.finish() for run in runs]


def advance(runs: Sequence["Run"], stopped: Sequence[int] = ()) -> None:
    """Take all steps that are left, every batch once.

    Args:
        runs: of one store.
        stopped: signals that came; the first ends this after the step, with checkpoints.
    """
    saved = time.monotonic()
    every_s, ranks = runs[0].runtime["checkpoint_every_s"], runs[0].ranks
    left = streams(runs)
    while left:
        sharing = left.pop(0)
        numbers = range(min(run.step for run in sharing), max(run.total for run in sharing))
        names = sharing[0].config.name if len(sharing) == 1 else f"{len(sharing)} SAEs"
        with closing(sharing[0].raw_batches(numbers.start)) as batches:
            for number in progress(numbers, f"training {names}", "step"):
                began = time.monotonic()
                x = next(batches)
                taking = [run for run in sharing if run.step == number < run.total]
                waited = (time.monotonic() - began) / max(1, len(taking))
                for run in taking:
                    run.take(x, waited)
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


def streams(runs: Sequence["Run"]) -> list[list["Run"]]:
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


class Run:
    """One training run and all of its state."""

    def __init__(
        self,
        store: Batches,
        config: SAEConfig,
        runtime: Mapping[str, Any],
        folder: Path,
        probe: Path | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        check_divides("batch_size", config.training.batch_size, self.ranks, "batch")
        self.store, self.config, self.runtime, self.folder = store, config, runtime, folder
        self.probe = probe
        self.device = torch.device(runtime["device"])
        self.is_bf16 = runtime["precision"] == "bf16"
        self.total = config.training.steps
        self.sae: SAE = build(config.variant, store.d_in, config.d_sae, config.options)
        self.inputs = InputScale.of(config.training.input_scale, store)
        if self.inputs.shift is not None and self.sae.b_dec is None:
            raise UserError(
                f"saes.{config.entry}.input_scale: expected a scale without a shift, since the SAE has no b_dec to "
                f"fold it into, found {config.training.input_scale}. Set unit or raw."
            )
        if probe is not None:
            self.sae.take_probe(probe, self.inputs)
        self.inputs = self.inputs.to(self.device)
        self.rows_of: Shuffled = store if self.sae.trains_on == "all" else store.last_rows()
        self.step = 0
        self.busy, self.busy_steps = 0.0, 0  # seconds and steps since the last line of the log
        self.rows: list[dict[str, float]] = []
        found = checkpoints(folder)
        if not found:
            with closing(self.batches()) as batches:
                generator = torch.Generator().manual_seed(config.seed)
                self.sae.initialise(next(batches).cpu(), generator)
        self.sae.join(self.ranks)
        self.sae.to(self.device).train()
        self.watch = Watch(self.device)
        self.cut = torch.zeros(
            (), dtype=torch.int64, device=self.device
        )  # rows, since the last log
        self.replayed: Replayed[tuple[Forward, dict[str, Tensor]]] | None = None
        if self.device.type == "cuda" and self.ranks.size == 1:
            self.replayed = Replayed(self.work, capture_cuda)
        self.silent = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=self.device)
        if not config.training.train_decoder:
            self.sae.freeze_decoder()
        self.optimizer = Optimizer(self.sae, config.training)
        if found:
            self.restore(found[-1])
        logging_to = runtime.get("logging")
        is_first = self.ranks.rank == 0
        self.live = Live(config, logging_to, self.step) if logging_to and is_first else None

    @property
    def identity(self) -> str:
        """Digest of what decides the weights: a checkpoint of another run is refused."""
        run: dict[str, Any] = {
            "config": dataclasses.asdict(self.config),
            "precision": self.runtime["precision"],
        }
        if self.probe is not None:
            run["probe"] = file_digest(self.probe / PROBE)
        if self.inputs.shift is not None:
            run["shift"] = self.inputs.shift.tolist()
        return json_digest({**run, "d_in": self.store.d_in, "scale": self.store.scale})

    @property
    def dead(self) -> Tensor:
        """(d_sae,) bool: latents silent for the last `dead_after_tokens` tokens, the step's own batch counted."""
        return self.silent >= self.config.training.dead_after_tokens

    def batches(self, start: int = 0) -> Generator[Tensor, None, None]:
        """Batches (B, d_in) from a number on, in this run's input scale."""
        with closing(self.raw_batches(start)) as batches:
            for batch in batches:
                yield self.inputs(batch)

    def raw_batches(self, start: int = 0) -> Generator[Tensor, None, None]:
        """Batches (B, d_in) from a number on, on the device, as runs of one stream share them."""
        size, seed = self.config.training.batch_size, self.config.seed
        locked = {"pin": True} if self.device.type == "cuda" else {}
        yield from on_device(self.rows_of.batches(size, seed, start, **locked), self.device)

    @property
    def stream(self) -> tuple[object, ...]:
        """Return what decides the batches, besides the store."""
        return self.sae.trains_on, self.config.training.batch_size, self.config.seed

    def take(self, x: Tensor, waited: float) -> None:
        """The next step, of its raw batch, for which it waited some seconds; now and then a line of the log."""
        config = self.config.training
        began = time.monotonic()
        fwd, losses, lr = self.one_step(self.inputs(self.ranks.own_rows(x)))
        self.step += 1
        is_logged = self.step % config.log_every_steps == 0 or self.step == self.total
        if is_logged:
            self.check()  # waits for the device, so that the speed is that of its work
            if acts_as_gpu(x):
                self.sae.settle()
                self.make_room()
        self.busy += waited + time.monotonic() - began
        self.busy_steps += 1
        if is_logged:
            self.log(fwd, losses, lr, self.busy_steps * config.batch_size / self.busy)
            self.busy, self.busy_steps = 0.0, 0

    def one_step(self, x: Tensor) -> tuple[Forward, dict[str, Tensor], float]:
        """Forward, losses, gradients, update; on a GPU recorded and launched at once."""
        self.sae.begin_step(self.step, self.total)
        self.watch.begin(self.step)
        lr = self.set_lr()
        if self.replayed is None:
            fwd, losses = self.work(x)
        else:
            fwd, losses = self.replayed(x, tuple(self.sae.dials().items()))
        return fwd, losses, lr

    def make_room(self) -> None:
        """Say how many rows were cut, if any were, and double the room of a row."""
        if cut := int(self.cut):
            logger.warning(
                "%s: step %d: %d rows since the last line of the log had more active latents than there was room "
                "for, and lost some; there is twice the room from here on",
                self.config.name, self.step, cut,
            )  # fmt: skip
            self.cut.zero_()
            self.sae.widened *= 2

    def work(self, x: Tensor) -> tuple[Forward, dict[str, Tensor]]:
        """A step without what the host decides of it: on a GPU, work for the device alone."""
        sae = self.sae
        try:
            with torch.autocast(self.device.type, torch.bfloat16, self.is_bf16):
                fwd = sae.run(x)
            self.silent.add_(self.ranks.rows(x)).masked_fill_(self.ranks.any_row(fwd.fired()), 0)
            losses = sae.losses(fwd, self.dead)
        except (
            ValueError
        ) as error:  # an operator met NaN, or weights so large that their products overflow
            with torch.no_grad():
                seen = (x, *sae.parameters(), sae.pre_activations(x))
            if all(bool(values.isfinite().all()) for values in seen):
                raise
            self.refuse(NotFinite(self.step, str(error), not bool(x.isfinite().all())))
        loss = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.share()
        norm = self.optimizer.measure()
        terms = {"loss": loss, **losses, "gradient norm": norm}
        cannot_be_taken = self.watch.look(x, terms)
        if not acts_as_gpu(x):  # where nothing is waited for
            self.check()
        self.optimizer.update(norm, cannot_be_taken)
        sae.end_step(fwd)
        self.cut.add_(fwd.cut_rows())
        return fwd, {name: term.detach() for name, term in {"loss": loss, **losses}.items()}

    def set_lr(self) -> float:
        training, peak = self.config.training, peak_lr(self.config)
        together, *apart = self.optimizer.param_groups
        together["lr"] = peak * lr_factor(self.step, self.total, training)
        for group in apart:
            group["lr"] = peak * warm_up(self.step - self.sae.apart_from(self.total), training)
        self.optimizer.tell_rates()
        return float(together["lr"])

    def check(self) -> None:
        """Stop if a step could not be taken since the last check; none after it was."""
        if (found := self.watch.read()) is not None:
            self.refuse(found)

    def refuse(self, found: NotFinite) -> NoReturn:
        """Stop at a step that cannot be taken; the weights are still those before it."""
        last = checkpoints(self.folder)
        kept = f"the last good checkpoint is {last[-1]}" if last else "there is no checkpoint yet"
        terms, advice = found.terms, "Lower lr, or look at the options."
        if found.is_of_batch:
            terms, advice = f"the batch is not finite; {terms}", "Look at the store."
        raise UserError(
            f"saes.{self.config.entry}: the loss is not finite at step {found.step} (batch {found.step} of "
            f"{self.config.name}; {terms}); {kept}. {advice}"
        )

    def log(self, fwd: Forward, losses: Mapping[str, Tensor], lr: float, speed: float) -> None:
        self.rows.append(
            {
                "step": self.step,
                "tokens_seen": self.step * self.config.training.batch_size,
                **{name: float(loss) for name, loss in losses.items()},
                **self.sae.facts(fwd),
                "l0": float(self.ranks.over_both(fwd.l0().sum()) / self.ranks.rows(fwd.x)),
                "dead": float(self.ranks.over_latents(self.dead.sum()) / self.config.d_sae),
                "lr": lr,
                "tokens_per_s": round(speed, 1),
            }
        )
        if self.live is not None:
            self.live.add(self.rows[-1])

    def checkpoint(self) -> None:
        """Write all state, and the steps so far for whoever watches."""
        self.check()
        tensors = self.weights("sae.")
        for name, parameter in self.sae.named_parameters():
            for key, part in self.optimizer.state.get(parameter, {}).items():
                whole = self.sae.whole_of(name, part) if part.ndim else part.clone()
                tensors[f"adam.{name}.{key}"] = whole
        silent = self.sae.whole_of("W_dec", self.silent)
        if self.ranks.rank:
            return
        rows = np.frombuffer(json.dumps(self.rows).encode(), np.uint8)
        tensors |= {
            "silent": silent,
            "widened": torch.tensor(self.sae.widened),
            "rows": torch.from_numpy(rows.copy()),
        }
        write_checkpoint(self.folder, self.step, tensors, {"run": self.identity})
        if self.rows:
            write_steps(self.folder / STEPS, self.rows)

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """The state of the whole SAE, which every rank has to ask for."""
        state = self.sae.state_dict()
        return {prefix + name: self.sae.whole_of(name, part) for name, part in state.items()}

    def restore(self, path: Path) -> None:
        """Take all state from a checkpoint of this run."""
        tensors, facts = read_checkpoint(path)
        if facts["run"] != self.identity:
            raise UserError(
                f"{path}: a checkpoint of another run (other parameters, or another store). Delete "
                f"{self.folder} to train afresh."
            )
        self.step, self.rows = facts["step"], json.loads(tensors["rows"].numpy().tobytes())
        part_of = self.sae.part_of
        weights = {name: part_of(name, tensors[f"sae.{name}"]) for name in self.sae.state_dict()}
        self.sae.load_state_dict(weights)
        for name, parameter in self.sae.named_parameters():
            prefix = f"adam.{name}."
            for key in [key for key in tensors if key.startswith(prefix)]:
                saved = part_of(name, tensors[key]) if tensors[key].ndim else tensors[key]
                if saved.shape == parameter.shape:  # in the parameter's own memory layout,
                    saved = torch.empty_like(parameter).copy_(saved)  # which fused Adam relies on
                self.optimizer.state[parameter][key.removeprefix(prefix)] = saved
        self.silent.copy_(part_of("W_dec", tensors["silent"]))
        self.sae.widened = int(tensors["widened"])
        logger.info("going on from %s", path)

    def finish(self) -> dict[str, str]:
        """Write the SAE in raw units, and its steps; digests of both, of no file on ranks but the first."""
        with torch.no_grad():
            self.sae.fold_scale(self.inputs.scale)
            if self.inputs.shift is not None:
                self.sae.fold_shift(self.inputs.shift)
        weights, config = self.weights(), dataclasses.asdict(self.config)
        if self.ranks.rank:
            return {}
        seen = self.store.positions
        read = {
            "d_in": self.store.d_in, "scale": self.store.scale, "model": self.store.model,
            "positions": [seen.start, seen.stop],
        }  # fmt: skip
        save(weights, self.folder, config | read)
        write_steps(self.folder / STEPS, self.rows)
        delete_checkpoints(self.folder)
        untimed = [{k: v for k, v in row.items() if k not in _TIMED} for row in self.rows]
        return {
            "weights": file_digest(self.folder / "weights.safetensors"),
            "steps": json_digest(untimed),
        }


def peak_lr(config: SAEConfig) -> float:
    """The learning rate, or 2e-4 / sqrt(d_sae / 2^14) for `auto`."""
    if config.training.lr == "auto":
        return _LR_AUTO / math.sqrt(config.d_sae / _LR_AUTO_WIDTH)
    return float(config.training.lr)


def lr_factor(step: int, total: int, config: TrainingConfig) -> float:
    """Linear warm-up over `lr_warmup_steps`, linear decay to 0 over the last `lr_decay_fraction`."""
    decay_steps = config.lr_decay_fraction * total
    return warm_up(step, config) * (min(1.0, (total - step) / decay_steps) if decay_steps else 1.0)


def warm_up(step: int, config: TrainingConfig) -> float:
    """Factor of the learning rate `step` steps after a warm-up began; 0 before."""
    return min(1.0, max(0, step + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0


def write_steps(path: Path, rows: list[dict[str, float]]) -> None:
    """Write steps.csv: a line per logged step."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as staged:
        staged.write_text(text.getvalue())
