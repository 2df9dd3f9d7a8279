"""Questions whose answers are written out by hand."""

from typing import Any

import numpy as np
import pytest

from saeflow.evaluation.tasks import TOKENS, asked, tasks
from saeflow.sources.scenes import CLASSES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", {"starts a word"}),
        (" The", {"starts a word", "capitalised"}),
        ("ing", {"letters without a space before"}),
        ("The", {"letters without a space before", "capitalised"}),
        ("\nfoo", {"starts a word"}),
        (" Éa", {"starts a word", "capitalised"}),
        ("ß", {"letters without a space before"}),
        ("12", {"number"}),
        (" 3rd", {"number"}),
        (".", {"punctuation"}),
        (" (", {"punctuation"}),
        ("...", {"punctuation"}),
        ("_x", set()),
        (" don't", set()),
        (" ", {"white space"}),
        ("\n\n", {"white space"}),
        ("\ufffd", set()),  # a byte of a longer character
        (" \ufffd", set()),
        ("", set()),  # a special token
    ],
)
def test_what_a_token_says_of_itself(text: str, expected: set[str]) -> None:
    assert {name for name, says in TOKENS.items() if says(text)} == expected


def of_text(**known: Any) -> dict[str, np.ndarray]:
    columns = {
        "token": np.array([3, 1, 3, 2, 0]), "context": np.array([0, 2, 1, 1, 2]),
        "position": np.array([1, 2, 1, 2, 1]),
    }  # fmt: skip
    return tasks(columns, {"strings": lambda token: ["7", " a", ".", "B"][token], **known})


def test_every_row_is_asked_about_its_own_token() -> None:
    found = of_text()
    assert found["capitalised"].tolist() == [True, False, True, False, False]
    assert found["starts a word"].tolist() == [False, True, False, False, False]
    assert found["number"].tolist() == [False, False, False, False, True]
    assert found["punctuation"].tolist() == [False, False, False, True, False]
    assert all(answers.dtype == bool for answers in found.values())
    assert not any(name.startswith("document") for name in found)


def test_a_rows_document_is_its_contexts() -> None:
    known = {"kinds": ["book", "web", "book"], "all_kinds": {"web", "book"}}
    found = of_text(**known)
    kinds = {name for name in found if name.startswith("document")}
    assert kinds == {"document: web"}  # book is its no
    assert found["document: web"].tolist() == [False, False, True, True, False]


def test_a_split_without_some_kind_is_asked_the_same_questions() -> None:
    every = {"book", "code", "web"}
    whole = of_text(kinds=["book", "web", "code"], all_kinds=every)
    part = of_text(kinds=["book", "book", "book"], all_kinds=every)
    assert list(whole) == list(part)
    assert part["document: book"].all()
    assert not part["document: web"].any()
    assert whole["document: code"].tolist() == [False, True, False, False, True]


def test_a_patch_is_asked_what_it_shows() -> None:
    names = [
        "small red object on a black background", "large red object on a white background",
        "small orange object on a grey background",
    ]  # fmt: skip
    shown = [CLASSES.index(name) for name in names]
    columns = {
        "cover": np.array([-1, *shown]), "label": np.zeros(4, int), "position": np.array([5, 1, 2, 3]),
    }  # fmt: skip
    found = tasks(columns, {"classes": CLASSES})
    assert found["an object"].tolist() == [False, True, True, True]
    assert found["red object"].tolist() == [False, True, True, False]
    assert found["orange object"].tolist() == [False, False, False, True]
    assert found["large object"].tolist() == [False, False, True, False]
    assert not found["blue object"].any()


def test_every_class_of_scenes_has_one_colour_and_a_size() -> None:
    every = np.arange(len(CLASSES))
    found = tasks({"cover": every, "position": every + 1}, {"classes": CLASSES})
    colours = [found[name] for name in found if name.endswith(" object") and name not in ("an object", "large object")]  # fmt: skip
    assert len(colours) == 7
    assert (np.sum(colours, axis=0) == 1).all()
    assert [bool(large) for large in found["large object"]] == ["large" in name for name in CLASSES]


def test_the_cls_token_of_a_scene_is_not_asked_what_a_patch_shows() -> None:
    columns = {"cover": np.array([-1, 4, -1]), "position": np.array([0, 3, 2])}
    assert asked(columns).tolist() == [False, True, True]
    assert asked({"position": np.array([0, 3, 2])}).all()  # text, labelled images, samples


def test_scenes_seen_by_the_cls_token_alone_are_asked_their_class() -> None:
    columns = {"cover": np.full(3, -1), "position": np.zeros(3, int), "label": np.array([1, 0, 1])}
    assert asked(columns).all()
    found = tasks(columns, {"classes": ["a", "b"]})
    assert {name: answers.tolist() for name, answers in found.items()} == {
        "a": [False, True, False], "b": [True, False, True],
    }  # fmt: skip


def test_each_of_the_first_classes_is_a_question_of_its_own() -> None:
    labels = np.array([0, 11, 12, -1, 11])
    names = [f"class {i}" for i in range(20)]
    found = tasks({"label": labels, "position": np.zeros(5, int)}, {"classes": names})
    assert list(found) == names[:12]
    assert found["class 11"].tolist() == [False, True, False, False, True]
    assert tasks({"label": labels, "position": labels}, {"classes": []}) == {}


def test_a_true_feature_is_active_where_the_sample_lists_it() -> None:
    indices = np.array([[0, 3, -1], [2, 7, 9], [-1, -1, -1], [7, -1, -1]])
    found = tasks({"true_indices": indices, "position": np.zeros(4, int)}, {})
    assert list(found) == [f"feature {i}" for i in range(8)]
    assert found["feature 0"].tolist() == [True, False, False, False]
    assert found["feature 7"].tolist() == [False, True, False, True]
    assert not found["feature 1"].any()
