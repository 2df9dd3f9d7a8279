"""Steps and rows of a stream's windows; SAEs trained on it are those trained on the kept store in the same order."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saeflow.config import contexts_of, draw_of, n_windows, steps_of
from saeflow.errors import UserError
from saeflow.stores import (
    DrawnWindow,
    WindowByWindow,
    finalise,
    join,
    open_store,
    remember,
    verify,
    window_facts,
    write_part,
)
from saeflow.training import train_group, train_part

from ..training.conftest import RUNTIME, config


@given(
    rows=st.integers(10, 5000), of_window=st.integers(1, 600), batch_size=st.integers(1, 300), passes=st.integers(1, 3)
)  # fmt: skip
def test_every_step_is_one_of_one_draw(
    rows: int, of_window: int, batch_size: int, passes: int
) -> None:
    store = {"train_rows": rows, "window_rows": of_window}
    windows = n_windows(store, "train")
    total = -(-passes * rows // batch_size)
    found = [step for d in range(passes * windows + 1) for step in steps_of(d, batch_size, store)]
    assert found[:total] == list(range(total))
    for step in range(total):
        draw = draw_of(step, batch_size, store)
        assert step in steps_of(draw, batch_size, store)
        # the step's first row, in the share of the rows that the draw has
        assert draw * rows <= step * batch_size * windows < (draw + 1) * rows


@pytest.fixture
def layout(store_params: dict[str, Any]) -> dict[str, Any]:
    return {
        **store_params,
        "train_rows": 37 * 7,
        "window_rows": 70,
        "chunk_rows": 4,
        "is_streamed": True,
    }


def drawn(folder: Path, source: Any, store: dict[str, Any], draw: int, first: Any) -> DrawnWindow:
    place = folder / str(draw)
    (place / "part").mkdir(parents=True)
    window = draw % n_windows(store, "train")
    write_part(source, "train", 0, 1, store, place / "part", window=window)
    params = {"kind": "tiny", "hook_points": ["a", "b"], "max_norm_multiple": None}
    finalise([place / "part"], "tiny", params, "train", store, {"model": "0"}, place, window)
    opened = open_store(place / "a.zarr")
    return DrawnWindow(opened, draw, first or opened.attrs)


def test_a_draws_batches_are_its_windows_rows_and_go_on_where_they_stopped(
    tmp_path: Path, source: Any, layout: dict[str, Any]
) -> None:
    first = drawn(tmp_path, source, layout, 0, None)
    orders = []
    for draw in (1, 5):  # the same window in two passes
        window = drawn(tmp_path, source, layout, draw, first.window.attrs)
        assert (window.scale, window.mean.tolist()) == (first.scale, first.mean.tolist())
        steps = steps_of(draw, 10, layout)
        assert len(steps) in (6, 7)  # 63 rows, as 259 / 4 are
        given = torch.cat([batch.x for batch in window.batches(10, 3, steps.start)])
        assert len(given) == 10 * len(steps)
        assert len(np.unique(given[:60].numpy(), axis=0)) == 60  # no row twice, of 63
        rows = {tuple(row) for row in window.window.read(0, 63).tolist()}
        assert {tuple(row) for row in given.tolist()} <= rows
        late = [batch.x for batch in window.batches(10, 3, steps.start + 4)]
        assert torch.equal(torch.cat(late), given[40:])
        assert not list(window.batches(10, 3, steps.stop))
        with pytest.raises(UserError, match=f"expected to go on at step {steps.start} or later"):
            window.batches(10, 3, steps.start - 1)
        last = torch.cat([b.x for b in islice(window.last_rows().batches(10, 3, steps.start), 1)])
        assert {tuple(row) for row in last.tolist()} <= rows
        orders.append(given)
    assert not torch.equal(orders[0], orders[1])


def test_another_window_than_the_draws_is_refused(
    tmp_path: Path, source: Any, layout: dict[str, Any]
) -> None:
    first = drawn(tmp_path, source, layout, 0, None)
    second = drawn(tmp_path, source, layout, 1, first.window.attrs)
    for window, number, facts in [(second, 2, first), (second, 1, second)]:
        with pytest.raises(UserError, match=r"expected windows . and 0, found 1 and"):
            DrawnWindow(window.window, number, facts.window.attrs)


def test_a_kept_stores_batches_are_those_of_its_windows(
    tmp_path: Path, source: Any, layout: dict[str, Any]
) -> None:
    """Whole contexts of the source tell which window a row is of."""
    windows = [drawn(tmp_path, source, layout, draw, None) for draw in range(1)]
    windows += [drawn(tmp_path, source, layout, d, windows[0].window.attrs) for d in range(1, 4)]
    (tmp_path / "kept").mkdir()
    join([tmp_path / str(draw) for draw in range(4)], ["a", "b"], tmp_path / "kept")
    kept = WindowByWindow(open_store(tmp_path / "kept" / "a.zarr"))
    given = [batch.x for batch in islice(kept.batches(10, 3), 52)]  # two epochs of 259 rows
    place = {
        tuple(row): window
        for window in range(4)
        for context in contexts_of(window, 4, 37)
        for row in source.activations("train", context, "a").tolist()
    }
    for number, batch in enumerate(given):
        assert {place[tuple(row)] for row in batch.tolist()} == {draw_of(number, 10, layout) % 4}
    for start in (0, 5, 20, 31):
        assert torch.equal(next(kept.batches(10, 3, start)).x, given[start])
    for draw in range(4):
        steps = steps_of(draw, 10, layout)
        own = [batch.x for batch in windows[draw].batches(10, 3, steps.start)]
        assert torch.equal(torch.cat(own), torch.cat(given[steps.start : steps.stop]))
    last = {tuple(row) for row in source.all_rows("train", "a")[6::7].tolist()}
    assert {tuple(row) for row in next(kept.last_rows().batches(9, 0)).x.tolist()} <= last


def test_saes_of_a_stream_are_those_of_the_kept_store(
    tmp_path: Path, make_source: Any, store_params: dict[str, Any]
) -> None:
    """One process for the kept store; for the stream a new state of every SAE for each draw, in an epoch and a half."""
    source = make_source({"train": 300, "evaluation": 10}, d_in=16)
    layout = {**store_params, "train_rows": 2100, "window_rows": 700}
    batches = {
        "topk": {"batch_size": 64, "tokens": 3200},
        "relu": {"batch_size": 100, "tokens": 1500},
    }
    configs = [config(variant, **changes) for variant, changes in batches.items()]
    draws = [
        drawn(tmp_path, source, layout, 0, None),
        *(drawn(tmp_path, source, layout, d, read_facts(tmp_path)) for d in range(1, 5)),
    ]
    for way in ("kept", "stream"):
        (tmp_path / way).mkdir()

    def runs(way: str) -> list[Any]:
        return [(one, tmp_path / way / one.entry, None) for one in configs]

    join([tmp_path / str(draw) for draw in range(3)], ["a", "b"], tmp_path / "kept")
    store = open_store(tmp_path / "kept" / "a.zarr")
    kept = train_group(WindowByWindow(store), runs("kept"), RUNTIME)
    apart = train_group(store, runs("all at once"), RUNTIME)
    for one in draws:
        train_part(one, runs("stream"), RUNTIME)
    facts = [window_facts(tmp_path / str(draw), ["a"]) for draw in range(3)]
    remember(facts, tmp_path / "stream")
    gone = open_store(tmp_path / "stream" / "a.zarr")
    streamed = train_group(gone, runs("stream"), RUNTIME)
    assert [one.content for one in streamed] == [one.content for one in kept]
    assert all(a.content != b.content for a, b in zip(apart, kept, strict=True))
    assert gone.attrs["content_digest"] == store.attrs["content_digest"] == verify(gone.path)
    assert (gone.rows, gone.scale, gone.mean.tolist()) == (2100, store.scale, store.mean.tolist())
    with pytest.raises(UserError, match="expected rows, found a store whose windows were deleted"):
        gone.read(0, 1)
    with pytest.raises(UserError, match="expected rows, found a store whose windows were deleted"):
        train_group(gone, runs("again"), RUNTIME)


def read_facts(folder: Path) -> dict[str, Any]:
    return window_facts(folder / "0", ["a"])["a"]
