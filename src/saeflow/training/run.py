"""One training run and all of its state, from a store's shuffled batches to saved weights."""

import dataclasses
import json
import logging
from collections.abc import Generator, Mapping
from contextlib import closing
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from saeflow.batch import Batch
from saeflow.complexity.files import PROBE
from saeflow.config import SAEConfig
from saeflow.errors import UserError
from saeflow.files import file_digest, json_digest
from saeflow.operators import acts_as_gpu
from saeflow.operators.gpu.record import count_silent
from saeflow.saes import SAE, Forward, InputScale, Ranks, build, save
from saeflow.saes.ranks import check_divides
from saeflow.stores.batches import on_device
from saeflow.training.checkpoints import (
    checkpoints,
    delete_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from saeflow.training.clock import Clock, running
from saeflow.training.finite import NotFinite, Watch
from saeflow.training.graphs import Replayed, capture_cuda
from saeflow.training.live import Live
from saeflow.training.optimizer import Optimizer
from saeflow.training.orthogonality import Orthogonality
from saeflow.training.rates import lr_factor, peak_lr, warm_up
from saeflow.training.room import Lacking, Room
from saeflow.training.rows import Batches, Shuffled, check_targets
from saeflow.training.steps import STEPS, batch_fvu, steps_digest, write_steps
from saeflow.training.usage import Usage

logger = logging.getLogger(__name__)


class Stepped(NamedTuple):
    """The pass and the loss, with its terms, of a step that was taken."""

    fwd: Forward
    losses: dict[str, Tensor]


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
        kind = config.training.input_scale
        self.inputs = self.targets = InputScale.of(kind, store)
        if store.targets is not None:
            check_targets(self.sae, config, store.targets)
            self.targets = InputScale.of(kind, store.targets)
        if self.inputs.shift is not None and self.sae.b_dec is None:
            raise UserError(
                f"saes.{config.entry}.input_scale: expected a scale without a shift, since the SAE has no b_dec to "
                f"fold it into, found {config.training.input_scale}. Set unit or raw."
            )
        if probe is not None:
            self.sae.take_probe(probe, self.inputs)
        self.inputs = self.inputs.to(self.device)
        self.targets = self.inputs if store.targets is None else self.targets.to(self.device)
        self.rows_of: Shuffled = store if self.sae.trains_on == "all" else store.last_rows()
        self.step = 0
        self.clock = Clock(self.device)
        self.clocks = [self.clock]  # of all runs that step with this one
        self.logged = 0, 0.0  # steps and seconds of this process up to the last line of the log
        self.taken = 0  # steps of this process
        self.rows: list[dict[str, float]] = []
        found = checkpoints(folder)
        if not found:
            with closing(self.batches()) as batches:
                generator = torch.Generator().manual_seed(config.seed)
                self.sae.initialise(next(batches).map(Tensor.cpu), generator)
        self.sae.join(self.ranks)
        self.sae.to(self.device).train()
        self.orthogonality = Orthogonality.of(self.sae, config)
        self.watch = Watch(self.device)
        self.one = torch.ones((), device=self.device)  # the loss's gradient, which torch else makes
        self.replayed: Replayed[Stepped] | None = None
        if self.device.type == "cuda" and self.ranks.size == 1:
            self.replayed = Replayed(self.work, capture_cuda)
        self.silent = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=self.device)
        self.usage = Usage(self.sae)
        moving = (b for name, b in self.sae.named_buffers() if name not in self.sae.constants)
        self.room = Room([self.silent, *self.usage.state, *moving])
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
        if self.targets is not self.inputs:
            shift = None if self.targets.shift is None else self.targets.shift.tolist()
            run["targets"] = {"scale": self.targets.scale, "shift": shift}
        return json_digest({**run, "d_in": self.store.d_in, "scale": self.store.scale})

    @property
    def dead(self) -> Tensor:
        """(d_sae,) bool: latents silent for the last `dead_after_tokens` tokens, the step's own batch counted."""
        return self.silent >= self.config.training.dead_after_tokens

    def scaled(self, batch: Batch) -> Batch:
        """Return raw inputs and targets in this run's input scale."""
        return batch.map(self.inputs, self.targets)

    def batches(self, start: int = 0) -> Generator[Batch, None, None]:
        """Batches from a number on, in this run's input scale."""
        with closing(self.raw_batches(start)) as batches:
            for batch in batches:
                yield self.scaled(batch)

    def raw_batches(self, start: int = 0) -> Generator[Batch, None, None]:
        """Batches from a number on, on the device, as runs of one stream share them."""
        size, seed = self.config.training.batch_size, self.config.seed
        locked = {"pin": True} if self.device.type == "cuda" else {}
        yield from on_device(self.rows_of.batches(size, seed, start, **locked), self.device)

    @property
    def stream(self) -> tuple[object, ...]:
        """Return what decides the batches, besides the store."""
        return self.sae.trains_on, self.config.training.batch_size, self.config.seed

    def take(self, batch: Batch, waited: float) -> None:
        """The next step, of its raw batch, for which it waited some seconds; now and then a line of the log."""
        self.clock.waited(waited)
        with running([self.clock]):
            stepped = self.one_step(self.scaled(batch.map(self.ranks.own_rows)))
        self.end(stepped, batch)

    def one_step(self, batch: Batch) -> Stepped:
        """Forward, losses, gradients, update; on a GPU recorded and launched at once."""
        self.begin()
        if self.replayed is None:
            return self.work(batch)
        return self.replayed(batch, tuple(self.sae.dials().items()))

    def begin(self) -> None:
        """Set all that schedules decide of the next step."""
        if self.has_room:
            self.room.begin(self.step)
        self.sae.begin_step(self.step, self.total)
        if self.orthogonality is not None:
            self.orthogonality.begin(self.step)
        self.usage.begin(self.step)
        self.watch.begin(self.step)
        self.set_lr()

    def end(self, stepped: Stepped, batch: Batch) -> None:
        """Count a step that was taken of a raw batch, and log it if it is one of those that are."""
        config = self.config.training
        is_line = (self.step + 1) % config.log_every_steps == 0 or self.step + 1 == self.total
        if self.has_room:
            self.room.send(self.step, batch)
            stepped = self.catch_up(is_all=is_line) or stepped
        self.step += 1
        self.taken += 1
        if not is_line:
            return
        self.check()
        if acts_as_gpu(self.sae.W_dec):
            self.sae.settle()
            if stepped.fwd.dead is not None:
                self.sae.settle_dead(self.usage.most(self.dead))
        steps_before, seconds_before = self.logged
        seconds = self.clock.read()
        rows = (self.taken - steps_before) * config.batch_size
        self.log(stepped, rows / (seconds - seconds_before))
        self.logged = self.taken, seconds

    @property
    def has_room(self) -> bool:
        """Return whether rows have the same room, so that a step may lack some."""
        return acts_as_gpu(self.sae.W_dec) and self.sae.room is not None

    def catch_up(self, *, is_all: bool) -> Stepped | None:
        """Take steps again that lacked room, of all that were taken or of those that are read by now; the last one."""
        step = self.step
        taken = self.room.catch_up(self.take_again, self.make_room, is_all=is_all)
        self.step = step
        return taken

    def take_again(self, number: int, batch: Batch) -> Stepped:
        """Take a step of a number, of its raw batch."""
        self.step = number
        with running(self.clocks):
            return self.one_step(self.scaled(batch.map(self.ranks.own_rows)))

    def make_room(self, step: int, lacking: Lacking) -> None:
        """Say what a step lacked room for, and make some."""
        logger.info(
            "%s: step %d is taken again, since there was no room for all latents of %d rows, or for %d dead latents",
            self.config.name, step, *lacking,
        )  # fmt: skip
        if lacking.rows:
            self.sae.widen()
        if lacking.dead:
            self.sae.settle_dead(lacking.dead)

    def autocast(self) -> torch.autocast:
        """The precision of the products of a pass; losses, AuxK's columns and a probe's score are exact."""
        return torch.autocast(self.device.type, torch.bfloat16, self.is_bf16)

    def work(self, batch: Batch) -> Stepped:
        """A step without what the host decides of it: on a GPU, work for the device alone."""
        sae = self.sae
        self.optimizer.zero_grad()  # scores then lie where the last step's gradients and scores lay
        try:
            with self.autocast():
                fwd = sae.run(batch)
            losses = self.judge(fwd)
            fwd.forget_scores(with_latents=sae.forgets_latents)
        except (
            ValueError
        ) as error:  # an operator met NaN, or weights so large that their products overflow
            with torch.no_grad():
                seen = (*batch.tensors(), *sae.parameters(), sae.pre_activations(batch.x))
            if all(bool(values.isfinite().all()) for values in seen):
                raise
            self.refuse(NotFinite(self.step, str(error), not batch.is_finite()))
        losses["loss"].backward(self.one)
        return self.learn(fwd, losses)

    def judge(self, fwd: Forward) -> dict[str, Tensor]:
        """Count which latents fired; the loss of a pass, and its terms."""
        fired, rows = self.ranks.any_row(fwd.fired()), self.ranks.rows(fwd.x)
        dead = count_silent(self.silent, fired, rows, self.config.training.dead_after_tokens)
        terms = self.sae.losses(fwd, self.usage.trained_by_auxk(fwd, dead))
        if self.orthogonality is not None:
            terms = terms | {"orthogonality": self.orthogonality.loss()}
        return {"loss": reduce(torch.add, terms.values()), **terms}

    def learn(self, fwd: Forward, losses: Mapping[str, Tensor]) -> Stepped:
        """Update weights and statistics, once gradients are there."""
        self.optimizer.share()
        norms = self.optimizer.measure()
        names = "gradient norm", f"gradient norm of {' and '.join(self.sae.apart)}"
        terms = {**losses, **dict(zip(names, norms, strict=False))}
        again = None
        if self.has_room:
            again = self.room.look(self.watch.now, self.ranks.largest(fwd.lacking()))
        cannot_be_taken = self.watch.look(fwd.batch, terms, again)
        if not acts_as_gpu(fwd.x):  # where nothing is waited for
            self.check()
        self.optimizer.update(norms, cannot_be_taken)
        self.sae.end_step(fwd)
        fwd.forget_graph()
        return Stepped(fwd, {name: term.detach() for name, term in losses.items()})

    def set_lr(self) -> None:
        training, peak = self.config.training, peak_lr(self.config)
        together, *apart = self.optimizer.param_groups
        together["lr"] = peak * lr_factor(self.step, self.total, training)
        for group in apart:
            group["lr"] = peak * warm_up(self.step - self.sae.apart_from(self.total), training)
        self.optimizer.tell_rates()

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

    def log(self, stepped: Stepped, speed: float) -> None:
        fwd = stepped.fwd
        self.rows.append(
            {
                "step": self.step,
                "tokens_seen": self.step * self.config.training.batch_size,
                **{name: float(loss) for name, loss in stepped.losses.items()},
                **self.sae.facts(fwd),
                "batch_fvu": batch_fvu(fwd, self.ranks),
                "l0": float(self.ranks.over_both(fwd.l0().sum()) / self.ranks.rows(fwd.x)),
                "dead": float(self.ranks.over_latents(self.dead.sum()) / self.config.d_sae),
                "lr": float(self.optimizer.param_groups[0]["lr"]),
                "tokens_per_s": round(speed, 1),
            }
        )
        if self.live is not None:
            self.live.add(self.rows[-1])

    def checkpoint(self) -> None:
        """Write all state, and the steps so far for whoever watches."""
        if self.has_room:
            self.catch_up(is_all=True)
        self.check()
        tensors = self.weights("sae.")
        for name, parameter in self.sae.named_parameters():
            for key, part in self.optimizer.state.get(parameter, {}).items():
                whole = self.sae.whole_of(name, part) if part.ndim else part.clone()
                tensors[f"adam.{name}.{key}"] = whole
        tensors |= {"silent": self.sae.whole_of("W_dec", self.silent), **self.usage.saved()}
        if self.ranks.rank:
            return
        rows = np.frombuffer(json.dumps(self.rows).encode(), np.uint8)
        tensors |= {
            "room": torch.tensor([self.sae.widened, self.sae.dead_room]),
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
            for key, held in self.optimizer.state.get(parameter, {}).items():
                if (saved := tensors.get(f"adam.{name}.{key}")) is not None:
                    held.copy_(part_of(name, saved) if saved.ndim else saved)
        self.silent.copy_(part_of("W_dec", tensors["silent"]))
        self.usage.restore(tensors)
        self.sae.widened, self.sae.dead_room = tensors["room"].tolist()
        logger.info("going on from %s", path)

    def finish(self) -> dict[str, str]:
        """Write the SAE in raw units, and its steps; digests of both, of no file on ranks but the first."""
        self.sae.fold(self.inputs, self.targets)
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
        return {
            "weights": file_digest(self.folder / "weights.safetensors"),
            "steps": steps_digest(self.rows),
        }
