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
from collections.abc import Generator, Iterator, Mapping
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
from saeflow.progress import progress
from saeflow.saes import SAE, Forward, build, save
from saeflow.training.checkpoints import (
    checkpoints,
    delete_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from saeflow.training.memory import keep_freed_memory
from saeflow.training.optimizer import Optimizer

logger = logging.getLogger(__name__)

STEPS = "steps.csv"
_TIMED = ("tokens_per_s",)
_LR_AUTO, _LR_AUTO_WIDTH = 2e-4, 2**14  # Gao et al. 2024, scaled as 1/sqrt(d_sae)


class Shuffled(Protocol):
    """Rows in endless shuffled batches."""

    def batches(self, batch_size: int, seed: int, start_batch: int = 0) -> Iterator[Tensor]:
        """Endless shuffled batches (B, d_in), from any number on; dropped when done with."""
        ...


class Batches(Shuffled, Protocol):
    """What the trainer needs of a store."""

    d_in: int
    scale: float

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
        runtime: device, precision, checkpoint_every_s.
        folder: written: weights.safetensors, config.json, steps.csv.
        probe: folder of a fitted complexity probe, where the run's options name one.

    Returns:
        Content digests: of the weights, and of what steps.csv says besides speed.

    Raises:
        UserError: options that do not fit, a loss that is not finite, a checkpoint that is damaged
            or of another run.
        SystemExit: 128 + the signal's number, after SIGTERM or SIGINT and a last checkpoint.
    """
    keep_freed_memory()
    run = Run(store, config, runtime, folder, probe)
    with run.stop_signals():
        run.train()
    return run.finish()


class Run:
    """One training run and all of its state."""

    def __init__(
        self,
        store: Batches,
        config: SAEConfig,
        runtime: Mapping[str, Any],
        folder: Path,
        probe: Path | None = None,
    ) -> None:
        self.store, self.config, self.runtime, self.folder = store, config, runtime, folder
        self.probe = probe
        self.device = torch.device(runtime["device"])
        self.is_bf16 = runtime["precision"] == "bf16"
        self.total = config.training.steps
        self.sae: SAE = build(config.variant, store.d_in, config.d_sae, config.options)
        if probe is not None:
            self.sae.take_probe(probe, store.scale)
        self.rows_of: Shuffled = store if self.sae.trains_on == "all" else store.last_rows()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0
        self.silent = torch.zeros(config.d_sae, dtype=torch.int64, device=self.device)
        self.rows: list[dict[str, float]] = []
        self.stopped_by: int | None = None
        torch.manual_seed(config.seed)
        found = checkpoints(folder)
        if not found:
            with closing(self.batches()) as batches:
                self.sae.initialise(next(batches).cpu(), self.generator)
        self.sae.to(self.device).train()
        if not config.training.train_decoder:
            self.sae.freeze_decoder()
        self.optimizer = Optimizer(self.sae, config.training)
        if found:
            self.restore(found[-1])

    @property
    def identity(self) -> str:
        """Digest of what decides the weights: a checkpoint of another run is refused."""
        run: dict[str, Any] = {
            "config": dataclasses.asdict(self.config),
            "precision": self.runtime["precision"],
        }
        if self.probe is not None:
            run["probe"] = file_digest(self.probe / PROBE)
        return json_digest({**run, "d_in": self.store.d_in, "scale": self.store.scale})

    @property
    def dead(self) -> Tensor:
        """(d_sae,) bool: latents silent for the last `dead_after_tokens` tokens."""
        return self.silent >= self.config.training.dead_after_tokens

    def batches(self, start: int = 0) -> Generator[Tensor, None, None]:
        """Batches (B, d_in) from a number on, in scaled units."""
        size, seed = self.config.training.batch_size, self.config.seed
        for batch in self.rows_of.batches(size, seed, start):
            yield batch.to(self.device, torch.float32) / self.store.scale

    def train(self) -> None:
        """All steps that are left."""
        config = self.config.training
        saved = logged = time.monotonic()
        logged_step = self.step
        with closing(self.batches(self.step)) as batches:
            for _ in progress(range(self.step, self.total), f"training {self.config.name}", "step"):
                fwd, losses, lr = self.one_step(next(batches))
                self.step += 1
                if self.step % config.log_every_steps == 0 or self.step == self.total:
                    now = time.monotonic()
                    speed = (self.step - logged_step) * config.batch_size / (now - logged)
                    self.log(fwd, losses, lr, speed)
                    logged, logged_step = now, self.step
                if self.stopped_by or time.monotonic() - saved > self.runtime["checkpoint_every_s"]:
                    self.checkpoint()
                    saved = time.monotonic()
                if self.stopped_by:
                    raise SystemExit(128 + self.stopped_by)

    def one_step(self, x: Tensor) -> tuple[Forward, dict[str, Tensor], float]:
        """Forward, losses, gradients, update."""
        sae = self.sae
        sae.begin_step(self.step, self.total)
        lr = self.set_lr()
        try:
            with torch.autocast(self.device.type, torch.bfloat16, self.is_bf16):
                fwd = sae.run(x)
            losses = sae.losses(fwd, self.dead)
        except ValueError as error:  # an operator met NaN
            if all(bool(values.isfinite().all()) for values in (x, *sae.parameters())):
                raise
            self.refuse(x, str(error))
        loss = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad()
        loss.backward()
        norm = self.optimizer.measure()
        if not bool((loss + norm).isfinite()):  # before the weights see it
            terms = {**losses, "gradient norm": norm}
            self.refuse(x, ", ".join(f"{name} {float(t.detach()):g}" for name, t in terms.items()))
        self.optimizer.update(norm)
        sae.end_step(fwd)
        self.silent.add_(len(x)).masked_fill_(fwd.fired(), 0)
        return fwd, {name: term.detach() for name, term in {"loss": loss, **losses}.items()}, lr

    def set_lr(self) -> float:
        lr = peak_lr(self.config) * lr_factor(self.step, self.total, self.config.training)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def refuse(self, x: Tensor, found: str) -> NoReturn:
        """Stop at a step that cannot be taken; the weights are still those before it."""
        last = checkpoints(self.folder)
        kept = f"the last good checkpoint is {last[-1]}" if last else "there is no checkpoint yet"
        if bool(x.isfinite().all()):
            advice = "Lower lr, or look at the options."
        else:
            found, advice = f"the batch is not finite; {found}", "Look at the store."
        raise UserError(
            f"saes.{self.config.entry}: the loss is not finite at step {self.step} (batch {self.step} of "
            f"{self.config.name}; {found}); {kept}. {advice}"
        )

    def log(self, fwd: Forward, losses: Mapping[str, Tensor], lr: float, speed: float) -> None:
        self.rows.append(
            {
                "step": self.step,
                "tokens_seen": self.step * self.config.training.batch_size,
                **{name: float(loss) for name, loss in losses.items()},
                **self.sae.facts(fwd),
                "l0": float(fwd.l0().double().mean()),
                "dead": float(self.dead.double().mean()),
                "lr": lr,
                "tokens_per_s": round(speed, 1),
            }
        )

    def checkpoint(self) -> None:
        """Write all state, and the steps so far for whoever watches."""
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"adam.{name}.{key}": tensor for key, tensor in state.items()}
        rows = np.frombuffer(json.dumps(self.rows).encode(), np.uint8)
        tensors |= {
            "silent": self.silent,
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "rows": torch.from_numpy(rows.copy()),
        }
        write_checkpoint(self.folder, self.step, tensors, {"run": self.identity})
        if self.rows:
            write_steps(self.folder / STEPS, self.rows)

    def restore(self, path: Path) -> None:
        """Take all state from a checkpoint of this run."""
        tensors, facts = read_checkpoint(path)
        if facts["run"] != self.identity:
            raise UserError(
                f"{path}: a checkpoint of another run (other parameters, or another store). Delete "
                f"{self.folder} to train afresh."
            )
        self.step, self.rows = facts["step"], json.loads(tensors["rows"].numpy().tobytes())
        weights = {name: tensors[f"sae.{name}"] for name in self.sae.state_dict()}
        self.sae.load_state_dict(weights)
        for name, parameter in self.sae.named_parameters():
            prefix = f"adam.{name}."
            for key in [key for key in tensors if key.startswith(prefix)]:
                saved = tensors[key]
                if saved.shape == parameter.shape:  # in the parameter's own memory layout,
                    saved = torch.empty_like(parameter).copy_(saved)  # which fused Adam relies on
                self.optimizer.state[parameter][key.removeprefix(prefix)] = saved
        self.silent.copy_(tensors["silent"])
        self.generator.set_state(tensors["generator"])
        torch.set_rng_state(tensors["rng"])
        logger.info("going on from %s", path)

    def finish(self) -> dict[str, str]:
        """Write the SAE in raw units, and its steps."""
        with torch.no_grad():
            self.sae.fold_scale(self.store.scale)
        config = dataclasses.asdict(self.config)
        save(self.sae, self.folder, {**config, "d_in": self.store.d_in, "scale": self.store.scale})
        write_steps(self.folder / STEPS, self.rows)
        delete_checkpoints(self.folder)
        untimed = [{k: v for k, v in row.items() if k not in _TIMED} for row in self.rows]
        return {
            "weights": file_digest(self.folder / "weights.safetensors"),
            "steps": json_digest(untimed),
        }

    @contextmanager
    def stop_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after the step, with a checkpoint; a second one, at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can be told of signals
            return

        def stop(number: int, frame: object) -> None:
            if self.stopped_by:
                raise SystemExit(128 + number)
            self.stopped_by = number

        previous = {
            number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def peak_lr(config: SAEConfig) -> float:
    """The learning rate, or 2e-4 / sqrt(d_sae / 2^14) for `auto`."""
    if config.training.lr == "auto":
        return _LR_AUTO / math.sqrt(config.d_sae / _LR_AUTO_WIDTH)
    return float(config.training.lr)


def lr_factor(step: int, total: int, config: TrainingConfig) -> float:
    """Linear warm-up over `lr_warmup_steps`, linear decay to 0 over the last `lr_decay_fraction`."""
    warm = min(1.0, (step + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
    decay_steps = config.lr_decay_fraction * total
    return warm * (min(1.0, (total - step) / decay_steps) if decay_steps else 1.0)


def write_steps(path: Path, rows: list[dict[str, float]]) -> None:
    """Write steps.csv: a line per logged step."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as staged:
        staged.write_text(text.getvalue())
