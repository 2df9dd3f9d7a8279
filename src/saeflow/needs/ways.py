"""Three ways to hold the stores of a parameter file: kept whole, in windows, or as a stream of windows."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from saeflow.needs.steps import Needs
from saeflow.plan import Plan

_WINDOWS = 10
"""Windows of a store, beside which one window more is little."""
_KEPT = 2
"""Windows of a stream: one is trained on while the next is extracted."""


@dataclass(frozen=True)
class Way:
    """The same parameters with stores held in one way."""

    name: str
    needs: Needs

    @property
    def label(self) -> str:
        """The name, with the windows of the store that has most."""
        plan = self.needs.plan
        windows = {source: plan.windows(source, "train") for source in plan.sources}
        most = max(windows.values(), default=1)
        if most == 1:
            return self.name
        of = [source for source in plan.sources if plan.is_streamed(source)]
        kept = f"{min(_kept(plan, source) for source in of)} of " if of else ""
        return f"{self.name}, {kept}{most} windows"


def ways(needs: Needs) -> list[Way]:
    """The three ways; a store whose parameters give windows has those, another ten, or fewer that hold a batch."""
    return [
        Way("kept whole", _changed(needs, lambda *_: (None, None))),
        Way("windowed", _changed(needs, lambda source, plan: (_window_rows(plan, source), None))),
        Way("streamed", _changed(needs, lambda source, plan: _stream(plan, source))),
    ]


def not_streamed(needs: Needs) -> dict[str, str]:
    """Sources whose training split cannot be a stream, each with what reads its rows when training is over."""
    found = {source: needs.plan.readers_of_rows(source) for source in needs.plan.sources}
    return {source: readers[0] for source, readers in found.items() if readers}


def _changed(needs: Needs, chosen: Callable[[str, Plan], tuple[int | None, int | None]]) -> Needs:
    """The needs with other `window_rows` and `keep_windows` of each source that SAEs are trained on."""
    params: dict[str, Any] = copy.deepcopy(dict(needs.plan.params))
    for source in needs.plan.sources:
        if "train" in needs.plan.splits(source):
            window_rows, keep = chosen(source, needs.plan)
            params["stores"][source] |= {"window_rows": window_rows, "keep_windows": keep}
    return replace(needs, plan=Plan(params))


def _window_rows(plan: Plan, source: str) -> int | None:
    store: dict[str, int] = plan.params["stores"][source]
    if plan.windows(source, "train") > 1:
        return store["window_rows"]
    batches = [run.training.batch_size for run in plan.runs.values() if run.source == source]
    each = plan.kind(source).rows_per_context(plan.params["sources"][source]) or 1
    windows = min(_WINDOWS, store["train_rows"] // max([*batches, each]))
    return -(-store["train_rows"] // windows) if windows > 1 else None


def _stream(plan: Plan, source: str) -> tuple[int | None, int | None]:
    window_rows = _window_rows(plan, source)
    if window_rows is None or plan.readers_of_rows(source):
        return window_rows, None
    return window_rows, _kept(plan, source) if plan.is_streamed(source) else _KEPT


def _kept(plan: Plan, source: str) -> int:
    return int(plan.params["stores"][source]["keep_windows"])
