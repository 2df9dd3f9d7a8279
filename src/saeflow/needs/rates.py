"""Rates of a machine, from the file that `make bench` writes."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from saeflow.config import read_yaml
from saeflow.errors import UserError

NUMBERS = (
    "product_gflops", "forward_gflops", "images_s", "tokens_s", "store_read_gb_s", "store_write_gb_s", "job_s", "step_s"
)  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """Rates of a machine per second."""

    machine: str
    product_gflops: float
    """Rate of an encoder product."""
    forward_gflops: float
    """Rate of a model's forward pass."""
    images_s: float
    """Images decoded to a model's size in a second."""
    tokens_s: float
    """Tokens made of text in a second."""
    store_read_gb_s: float
    store_write_gb_s: float
    job_s: float
    """Seconds a job takes to start."""
    step_s: float
    """Seconds of a training step whose products take none."""
    steps: Mapping[str, Mapping[int, float]]
    """By variant and d_sae: encoder products that a training step costs."""
    arithmetic: tuple[str, ...] = ()
    """Rates that were worked out on paper and not measured."""

    @property
    def device(self) -> str:
        """The machine's name without what follows it: `2 cores` of `2 cores (x86_64), 2026-11-24`."""
        return re.split(r" \(|,", self.machine)[0]

    @classmethod
    def read(cls, path: Path) -> "Rates":
        """Read a file of rates.

        Raises:
            UserError: it is missing or lacks a rate.
        """
        values = read_yaml(path)
        if not isinstance(values, dict) or not isinstance(values.get("steps"), dict):
            raise UserError(f"{path}: expected rates as `make bench` writes them, found none.")
        for name in NUMBERS:
            if not isinstance(values.get(name), int | float) or not values[name] > 0:
                raise UserError(
                    f"{path}: {name}: expected a number above 0, found {values.get(name)!r}."
                )
        steps = {}
        for variant, costs in values["steps"].items():
            steps[variant] = {int(d_sae): float(cost) for d_sae, cost in costs.items()}
        numbers = {name: float(values[name]) for name in NUMBERS}
        machine, assumed = values.get("machine"), values.get("arithmetic", [])
        if not isinstance(machine, str):
            raise UserError(f"{path}: machine: expected the machine's name, found {machine!r}.")
        known = {*NUMBERS, *(f"steps.{variant}" for variant in steps)}
        if not isinstance(assumed, list) or not set(map(str, assumed)) <= known:
            raise UserError(
                f"{path}: arithmetic: expected names of rates ({', '.join(sorted(known))}), found {assumed!r}."
            )
        return cls(machine=machine, steps=steps, arithmetic=tuple(assumed), **numbers)

    def step_products(self, variant: str, d_sae: int) -> float:
        """Encoder products of a step, of the nearest dictionary size that was measured.

        Of a variant that was not measured, those of the most expensive one.
        """
        known = [self.steps[variant]] if variant in self.steps else list(self.steps.values())
        return max(
            costs[min(costs, key=lambda size: abs(math.log(size / d_sae)))] for costs in known
        )
