"""Scenes: what is drawn is what is said."""

import numpy as np
import pytest

from saeflow.sources import scenes

PARAMS = {"seed": 5, "smallest": 0, "largest": 6}


def test_a_scene_is_the_same_in_whatever_order_it_is_drawn() -> None:
    later = scenes.draw_scene(PARAMS, 7)
    scenes.draw_scene(PARAMS, 3)
    again = scenes.draw_scene(PARAMS, 7)
    assert later.things == again.things
    assert np.array_equal(scenes.render(later)[0], scenes.render(again)[0])
    assert scenes.draw_scene({**PARAMS, "seed": 6}, 7).things != later.things


def test_every_number_of_objects_is_as_frequent() -> None:
    counts = np.bincount(
        [len(scenes.draw_scene(PARAMS, n).things) for n in range(1400)], minlength=7
    )
    assert counts.min() > 140
    assert len(counts) == 7


def test_objects_lie_apart_and_inside() -> None:
    for number in range(60):
        scene = scenes.draw_scene({**PARAMS, "smallest": 6}, number)
        _, owner = scenes.render(scene)
        assert sorted(set(owner.ravel()) - {-1}) == list(range(6))
        for i, thing in enumerate(scene.things):
            rows, columns = np.nonzero(owner == i)
            assert abs(rows.mean() + 0.5 - thing.y) < 2.5
            assert abs(columns.mean() + 0.5 - thing.x) < 1.5
            assert (
                np.hypot(rows + 0.5 - thing.y, columns + 0.5 - thing.x).max()
                < 1.2 * thing.radius + 1
            )


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_an_object_has_its_colour(shape: str) -> None:
    for number in range(400):
        scene = scenes.draw_scene({**PARAMS, "smallest": 1, "largest": 1}, number)
        thing = scene.things[0]
        if thing.shape == shape and thing.texture == "plain":
            picture, owner = scenes.render(scene)
            seen = np.median(picture[owner == 0], axis=0)
            assert np.abs(seen - scenes.COLOURS[thing.colour]).max() <= 2
            ground = np.median(picture[owner == -1], axis=0)
            assert np.abs(ground - scenes.BACKGROUNDS[scene.background]).max() <= 2
            return
    pytest.fail("no such object in 400 scenes")


def test_a_caption_says_what_is_there() -> None:
    words = {"square": 0, "object": 0}
    for number in range(200):
        scene = scenes.draw_scene(PARAMS, number)
        text = scenes.caption(scene, PARAMS, number)
        told = text.split(", ")[1:] or [text]
        assert len(told) <= scenes.TOLD
        if len(scene.things) != 1:
            assert f"{scenes.NUMBERS[len(scene.things)]} objects" in text
        for thing in scene.things[: len(scene.things) if len(scene.things) <= scenes.TOLD else 0]:
            assert thing.colour in text
        if "background" in text:
            assert f"{scene.background} background" in text
        for word in words:
            words[word] += word in text
    assert all(words.values())


def test_the_class_is_that_of_the_largest_object() -> None:
    assert len(set(scenes.CLASSES)) == 42
    seen = set()
    for number in range(800):
        scene = scenes.draw_scene({**PARAMS, "smallest": 1}, number)
        largest = max(scene.things, key=lambda thing: thing.radius)
        name = f"{largest.size} {largest.colour} object on a {scene.background} background"
        assert scenes.CLASSES[scene.label] == name
        seen.add(scene.label)
    assert len(seen) == 42
    assert scenes.draw_scene({"seed": 0, "smallest": 0, "largest": 0}, 0).label == -1
