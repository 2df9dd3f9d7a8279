"""Images of every mode, broken ones, folders and data sets, against PIL and the library's own processor."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from saeflow.errors import UserError
from saeflow.sources import external_digest
from saeflow.sources.images import (
    NO_LABEL,
    Item,
    Preprocessing,
    Unreadable,
    as_rgb,
    images_digests,
    prepare_image,
    read_images,
    ready_images,
)

SIZE = 32
PREPROCESSING = Preprocessing(
    shorter_side=SIZE, height=SIZE, width=SIZE, resample=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4),
    patch=8,
)  # fmt: skip
RNG = np.random.default_rng(0)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 255, (height, width, 3), np.uint8))


def ready(content: bytes) -> np.ndarray:
    found = prepare_image(Item("a", 0, content), PREPROCESSING)
    assert not isinstance(found, str), found
    return found.pixels


@pytest.mark.parametrize("shape", [(64, 64), (90, 41), (33, 120), (32, 32), (20, 17), (500, 333)])
def test_pixels_are_those_of_the_models_own_processor(shape: tuple[int, int]) -> None:
    image = picture(*shape)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_rescale=False,
        do_normalize=False,
    )  # fmt: skip
    expected = processor(images=image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(ready(encoded(image)), expected.transpose(1, 2, 0))


def test_every_mode_becomes_rgb() -> None:
    grey = Image.fromarray(RNG.integers(0, 255, (SIZE, SIZE), np.uint8))
    as_three = np.repeat(np.asarray(grey)[..., None], 3, 2)
    assert np.array_equal(ready(encoded(grey)), as_three)
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert sixteen.mode == "I;16"
    assert np.array_equal(ready(encoded(sixteen)), as_three)
    rgb = picture(SIZE, SIZE)
    cmyk = encoded(rgb.convert("CMYK"), "TIFF")
    assert np.abs(ready(cmyk).astype(int) - np.asarray(rgb)).max() <= 1
    assert np.array_equal(ready(encoded(rgb.convert("P"))), np.asarray(rgb.convert("P").convert("RGB")))  # fmt: skip
    assert np.array_equal(ready(encoded(grey.convert("1"))), np.asarray(grey.convert("1").convert("RGB")))  # fmt: skip


def test_what_is_transparent_is_white() -> None:
    pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
    pixels[: SIZE // 2] = (255, 0, 0, 255)
    found = ready(encoded(Image.fromarray(pixels)))
    assert (found[: SIZE // 2] == (255, 0, 0)).all()
    assert (found[SIZE // 2 :] == 255).all()


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue", "lime")]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (ready(animated) == (255, 0, 0)).all()


def test_exif_turns_an_image_upright() -> None:
    image = picture(SIZE, SIZE)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    found = ready(encoded(image, "PNG", exif=exif))
    assert np.array_equal(found, np.asarray(image)[::-1, ::-1])


def test_one_pixel_is_an_image_of_one_colour() -> None:
    assert (ready(encoded(Image.new("RGB", (1, 1), (9, 80, 200)))) == (9, 80, 200)).all()
    assert ready(encoded(Image.new("L", (1, 400), 7))).shape == (SIZE, SIZE, 3)


def test_what_cannot_be_read_is_said() -> None:
    whole = encoded(picture(64, 64), "JPEG")
    for content in (b"", b"no image", whole[: len(whole) // 2], encoded(picture(9, 9))[:40]):
        assert isinstance(prepare_image(Item("a", 0, content), PREPROCESSING), str)


def test_an_unknown_mode_keeps_its_content() -> None:
    values = np.linspace(0, 5, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    found = np.asarray(as_rgb(Image.fromarray(values)))
    assert found[0, 0, 0] == 0
    assert found[-1, -1, 0] == 255


def make_folder(folder: Path, classes: dict[str, int]) -> Path:
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture(40, 36).save(folder / name / f"{number} $(x);.png")
    return folder


def test_a_folders_subfolders_are_its_classes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", {"dog": 3, "cat": 2})
    (folder / "dog" / "notes.txt").write_text("no image")
    classes, items = read_images({"folder": str(folder)})
    found = list(items)
    assert classes == ["cat", "dog"]
    assert sorted(item.label for item in found) == [0, 0, 1, 1, 1]
    assert {item.id.split("/")[0] for item in found if item.label == 1} == {"dog"}
    again = list(read_images({"folder": str(folder)})[1])
    assert [item.id for item in found] == [item.id for item in again]


def test_a_folder_without_classes_has_images_without_labels(tmp_path: Path) -> None:
    picture(9, 9).save(tmp_path / "a.png")
    classes, items = read_images({"folder": str(tmp_path)})
    assert classes is None
    assert [item.label for item in items] == [NO_LABEL]


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_images({"folder": str(tmp_path / "nothing")})
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="expected images"):
        read_images({"folder": str(tmp_path)})


def dataset_params(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "dataset": str(folder), "name": None, "revision": "0" * 40, "split": "train",
        "image_column": "image", "label_column": "label", "streaming": False, "shuffle_seed": None,
        **changes,
    }  # fmt: skip


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    images = [{"bytes": encoded(picture(30, 30)), "path": None} for _ in range(6)]
    labels, words = [0, 1, 2, 0, 1, 2], ["b", "a", "b", "a", "b", "a"]
    features = Features(
        {
            "image": ImageFeature(),
            "label": ClassLabel(names=["x", "y", "z"]),
            "word": Value("string"),
        }
    )
    columns = {"image": images, "label": labels, "word": words}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(columns, features).to_parquet(
        tmp_path / "data" / "train-00000-of-00001.parquet"
    )
    return tmp_path / "data"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_names_its_classes(dataset: Path, streaming: bool) -> None:
    classes, items = read_images(dataset_params(dataset, streaming=streaming))
    assert classes == ["x", "y", "z"]
    found = list(items)
    assert [item.label for item in found] == [0, 1, 2, 0, 1, 2]
    assert ready(found[0].content).shape == (SIZE, SIZE, 3)


def test_words_are_classes_too(dataset: Path) -> None:
    classes, items = read_images(dataset_params(dataset, label_column="word"))
    assert classes == ["a", "b"]
    assert [item.label for item in items] == [1, 0, 1, 0, 1, 0]
    with pytest.raises(UserError, match="streaming: false"):
        read_images(dataset_params(dataset, label_column="word", streaming=True))


def test_a_wrong_column_is_named(dataset: Path) -> None:
    with pytest.raises(UserError, match=r"no column 'picture'.*image, label, word"):
        read_images(dataset_params(dataset, image_column="picture"))


def test_a_shuffled_data_set_has_the_same_images(dataset: Path) -> None:
    plain = list(read_images(dataset_params(dataset))[1])
    mixed = list(read_images(dataset_params(dataset, shuffle_seed=1))[1])
    assert [item.content for item in plain] != [item.content for item in mixed]
    assert {item.content for item in plain} == {item.content for item in mixed}


def test_workers_change_nothing_and_keep_the_order() -> None:
    items = [Item(str(i), i, encoded(picture(20 + i, 40))) for i in range(40)]
    items[7] = Item("7", 7, b"broken")
    alone = list(ready_images(iter(items), PREPROCESSING, 1))
    several = list(ready_images(iter(items), PREPROCESSING, 3))
    assert [item.id for item, _ in several] == [str(i) for i in range(40)]
    for (_, a), (_, b) in zip(alone, several, strict=True):
        same = a == b if isinstance(a, str) or isinstance(b, str) else np.array_equal(a.pixels, b.pixels)  # fmt: skip
        assert same
    assert isinstance(several[7][1], str)


def test_unreadable_images_are_named_up_to_a_share(caplog: pytest.LogCaptureFixture) -> None:
    count = Unreadable(0.1, wanted=20)
    count.add(Item("good", 0, b""), None)
    count.add(Item("bad one", 0, b""), "cut off")
    count.add(Item("bad two", 0, b""), "cut off")
    assert count.ids == ["bad one", "bad two"]
    assert "bad one: cannot be read, left out (cut off)" in caplog.text
    with pytest.raises(
        UserError, match=r"3 of 4 cannot be read, more than unreadable_share \(0.1\)"
    ):
        count.add(Item("bad three", 0, b""), "cut off")


def test_a_folder_has_one_digest_that_follows_its_files(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", {"dog": 2, "cat": 1})
    before = images_digests({"folder": str(folder)})
    assert list(before) == [str(folder)]
    assert external_digest(str(folder)) == before[str(folder)]
    picture(9, 9).save(folder / "cat" / "0 $(x);.png")
    assert external_digest(str(folder)) != before[str(folder)]
