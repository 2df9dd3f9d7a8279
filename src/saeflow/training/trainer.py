"""The one trainer: any variant, from a store's shuffled batches to saved weights."""

import csv
import dataclasses
import io
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from saeflow.config import SAEConfig, TrainingConfig
from saeflow.errors import UserError
from saeflow.files import atomic_file, file_digest, json_digest
from saeflow.progress import progress
from saeflow.saes import SAE, Forward, build, save
from saeflow.training.checkpoints import checkpoints, read_checkpoint, write_checkpoint

logger = logging.getLogger(__name__)

STEPS = "steps.csv"
_TIMED = ("tokens_per_s",)
_LR_AUTO, _LR_AUTO_WIDTH = 2e-4, 2**14  # Gao et al. 2024, scaled as 1/sqrt(d_sae)


class Batches(Protocol):
    """What the trainer needs of a store."""

    d_in: int
    scale: float

    def batches(self, batch_size: int, seed: int, start_batch: int = 0) -> Iterator[Tensor]:
        """Endless shuffled batches (B, d_in)."""
        ...


def train(
    store: Batches, config: SAEConfig, runtime: Mapping[str, Any], folder: Path
) -> dict[str, str]:
    """Train one SAE, going on from a checkpoint in `folder` if there is one.

    Args:
        store: training activations.
        config: the run.
        runtime: device, precision, checkpoint_every_s.
        folder: written: weights.safetensors, config.json, steps.csv.

    Returns:
        Content digests: of the weights, and of what steps.csv says besides speed.

    Raises:
        UserError: options that do not fit, a loss that is not finite, a damaged checkpoint.
    """
    run = Run(store, config, runtime, folder)
    with run.stop_signals():
        run.train()
    return run.finish()


class Run:
    """One training run and all of its state."""

    def __init__(
        self, store: Batches, config: SAEConfig, runtime: Mapping[str, Any], folder: Path
    ) -> None:
        self.store, self.config, self.runtime, self.folder = store, config, runtime, folder
        self.device = torch.device(runtime["device"])
        self.total = config.training.steps
        self.sae: SAE = build(config.variant, store.d_in, config.d_sae, config.options)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0
        self.silent = torch.zeros(config.d_sae, dtype=torch.int64, device=self.device)
        self.rows: list[dict[str, float]] = []
        self.stopped_by: int | None = None
        torch.manual_seed(config.seed)
        found = checkpoints(folder)
        if not found:
            self.sae.initialise(self.scaled(next(self.batches())).cpu(), self.generator)
        self.sae.to(self.device).train()
        self.sae.W_dec.requires_grad_(config.training.train_decoder)
        self.optimizer = make_optimizer(self.sae, config.training)
        if found:
            self.restore(found[-1])

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        return self.store.batches(self.config.training.batch_size, self.config.seed, start)

    def scaled(self, batch: Tensor) -> Tensor:
        return batch.to(self.device, torch.float32) / self.store.scale

    def train(self) -> None:
        """All steps that are left."""
        config = self.config.training
        saved = logged = time.monotonic()
        tokens_logged = self.step
        batches = self.batches(self.step)
        for _ in progress(range(self.step, self.total), f"training {self.config.name}", "step"):
            x = self.scaled(next(batches))
            fwd, losses, lr = self.one_step(x)
            self.step += 1
            if self.step % config.log_every_steps == 0 or self.step == self.total:
                now = time.monotonic()
                speed = (self.step - tokens_logged) * config.batch_size / (now - logged)
                self.log(fwd, losses, lr, speed)
                logged, tokens_logged = now, self.step
            if self.stopped_by or time.monotonic() - saved > self.runtime["checkpoint_every_s"]:
                self.checkpoint()
                saved = time.monotonic()
            if self.stopped_by:
                raise SystemExit(128 + self.stopped_by)

    def one_step(self, x: Tensor) -> tuple[Forward, dict[str, Tensor], float]:
        """Forward, losses, gradients, update."""
        sae, config = self.sae, self.config.training
        sae.begin_step(self.step, self.total)
        lr = self.set_lr()
        with torch.autocast(self.device.type, torch.bfloat16, self.runtime["precision"] == "bf16"):
            fwd = sae.run(x)
        losses = sae.losses(fwd, self.silent >= config.dead_after_tokens)
        loss = torch.stack(list(losses.values())).sum()
        if not bool(loss.isfinite()):
            self.refuse(losses)
        self.optimizer.zero_grad()
        loss.backward()
        sae.project_grad()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), config.grad_clip)
        self.optimizer.step()
        sae.project_weights()
        sae.end_step(fwd)
        self.silent.add_(len(x)).masked_fill_(fwd.fired(), 0)
        return fwd, {name: term.detach() for name, term in {"loss": loss, **losses}.items()}, lr

    def set_lr(self) -> float:
        lr = peak_lr(self.config) * lr_factor(self.step, self.total, self.config.training)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def refuse(self, losses: Mapping[str, Tensor]) -> None:
        found = ", ".join(f"{name} {float(loss.detach()):g}" for name, loss in losses.items())
        last = checkpoints(self.folder)
        kept = f"the last good checkpoint is {last[-1]}" if last else "there is no checkpoint yet"
        raise UserError(
            f"saes.{self.config.entry}: the loss is not finite at step {self.step} (batch {self.step} of "
            f"{self.config.name}; {found}); {kept}. Lower lr, or look at the options."
        )

    def log(self, fwd: Forward, losses: Mapping[str, Tensor], lr: float, speed: float) -> None:
        dead = (self.silent >= self.config.training.dead_after_tokens).double().mean()
        self.rows.append(
            {
                "step": self.step,
                "tokens_seen": self.step * self.config.training.batch_size,
                **{name: float(loss) for name, loss in losses.items()},
                **self.sae.state_facts(),
                **fwd.facts,
                "l0": float(fwd.l0().double().mean()),
                "dead": float(dead),
                "lr": lr,
                "tokens_per_s": round(speed, 1),
            }
        )

    def checkpoint(self) -> None:
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": tensor for name, tensor in state.items()}
        tensors |= {
            "silent": self.silent,
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
        }
        write_checkpoint(self.folder, self.step, tensors, {"rows": self.rows})

    def restore(self, path: Path) -> None:
        tensors, counters = read_checkpoint(path)
        self.step, self.rows = counters["step"], counters["rows"]
        with torch.no_grad():
            for name, tensor in self.sae.state_dict(keep_vars=True).items():
                tensor.copy_(tensors[f"sae.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("adam."):
                _, number, key = name.split(".")
                state.setdefault(int(number), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
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
        for path in checkpoints(self.folder):
            path.unlink()
        untimed = [{k: v for k, v in row.items() if k not in _TIMED} for row in self.rows]
        return {
            "weights": file_digest(self.folder / "weights.safetensors"),
            "steps": json_digest(untimed),
        }

    @contextmanager
    def stop_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after a step, with a checkpoint."""

        def stop(number: int, frame: object) -> None:
            self.stopped_by = number

        previous = {
            number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def make_optimizer(sae: SAE, config: TrainingConfig) -> torch.optim.Adam:
    """Fused Adam over what is trained."""
    parameters = [parameter for parameter in sae.parameters() if parameter.requires_grad]
    return torch.optim.Adam(parameters, betas=sae.betas or config.betas, fused=True)


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
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as staged:
        staged.write_text(text.getvalue())
