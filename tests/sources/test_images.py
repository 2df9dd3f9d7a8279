"""Images of every mode, broken ones, folders and data sets, against PIL and the library's own processor."""

import io
import os
import resource
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from saeflow.errors import UserError
from saeflow.sources import external_digest
from saeflow.sources.decoding import Ready, Unreadable, as_rgb, prepare_image, ready_images
from saeflow.sources.images import NO_LABEL, Item, images_digests, read_images
from saeflow.sources.preprocessing import Preprocessing

SIZE = 32


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


PREPROCESSING = Preprocessing(
    size=SIZE, crop=(SIZE, SIZE), height=SIZE, width=SIZE, resample=3, factor=1 / 255, mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.4), patch=8, prefix=1,
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


@pytest.mark.parametrize("place", ["", "cat"])
@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".avif", ".tiff"])
def test_images_of_any_suffix_are_read(suffix: str, place: str, tmp_path: Path) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / f"a{suffix}").write_bytes(encoded(picture(9, 9), "JPEG"))
    assert [item.id for item in read_images({"folder": str(tmp_path)})[1]] == [
        f"{place}/a{suffix}".lstrip("/")
    ]


def test_what_is_left_out_of_a_folder_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path / "set", {"dog": 3, "cat": 2, ".ipynb_checkpoints": 2})
    (folder / "dog" / "._0.png").write_bytes(b"")
    (folder / "dog" / "notes.txt").write_text("no image")
    (folder / "dog" / "README").write_text("no image")
    for number in range(4):
        picture(9, 9).save(folder / f"{number}.png")
    classes, items = read_images({"folder": str(folder)})
    found = list(items)
    assert classes == ["cat", "dog"]
    assert sorted(item.label for item in found) == [NO_LABEL] * 4 + [0, 0, 1, 1, 1]
    assert "5 files are left out (.txt: 1, hidden: 3, no suffix: 1)" in caplog.text
    assert "4 images lie beside the class folders: they have no class" in caplog.text


def test_links_are_followed_and_digested(tmp_path: Path) -> None:
    real = make_folder(tmp_path / "real", {"a": 2})
    folder = make_folder(tmp_path / "set", {"dog": 1})
    (folder / "dog" / "more").symlink_to(real / "a")
    (real / "a" / "again").symlink_to(folder)  # round in a circle
    before = images_digests({"folder": str(folder)})
    assert len(list(read_images({"folder": str(folder)})[1])) == 3
    picture(9, 9).save(real / "a" / "0 $(x);.png")
    assert images_digests({"folder": str(folder)}) != before
    (folder / "gone.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"gone\.png: expected a file, found a link to nothing"):
        read_images({"folder": str(folder)})


def test_a_name_that_is_no_utf_8_is_written_as_text(tmp_path: Path) -> None:
    place = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(place)
    with open(place + b"/\xe9.png", "wb") as file:
        file.write(encoded(picture(9, 9)))
    classes, items = read_images({"folder": str(tmp_path)})
    assert classes == ["caf\\xe9"]
    assert [(item.id, item.label) for item in items] == [("caf\\xe9/\\xe9.png", 0)]


def test_class_folders_that_are_numbers_stand_in_their_order(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", {str(number): 1 for number in range(12)})
    classes, items = read_images({"folder": str(folder)})
    assert classes == [str(number) for number in range(12)]
    assert all(item.id.split("/")[0] == str(item.label) for item in items)


def labelled_parquet(folder: Path, labels: Any, images: Any = None) -> dict[str, Any]:
    folder.mkdir()
    images = images or [{"bytes": encoded(picture(9, 9)), "path": None} for _ in labels]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array(images, kind if isinstance(images[0], dict) else None)
    pq.write_table(pa.table({"image": cells, "label": labels}), folder / "data.parquet")
    return dataset_params(folder)


@pytest.mark.parametrize("labels", [list(range(12)), [str(n) for n in range(12)], [*range(-3, 9)]])
def test_whole_numbers_are_classes_in_their_order(labels: list[Any], tmp_path: Path) -> None:
    classes, items = read_images(labelled_parquet(tmp_path / "set", labels[::-1]))
    assert classes == [str(label) for label in labels]
    assert [item.label for item in items] == list(range(12))[::-1]


def test_a_null_label_is_no_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    classes, items = read_images(labelled_parquet(tmp_path / "set", [3, None, 1, None]))
    assert classes == ["1", "3"]
    assert [item.label for item in items] == [1, NO_LABEL, 0, NO_LABEL]
    assert "2 images have no label" in caplog.text


@pytest.mark.parametrize("labels", [[0.5, 1.0], [[1], [2]], [{"a": 1}, {"a": 2}], [b"a", b"b"]])
def test_labels_that_are_no_classes_are_refused(labels: list[Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected whole numbers or text in column 'label', found"):
        read_images(labelled_parquet(tmp_path / "set", labels))


@pytest.mark.parametrize("streaming", [False, True])
def test_cells_without_an_image_are_counted(streaming: bool, tmp_path: Path) -> None:
    good = encoded(picture(9, 9))
    (tmp_path / "outside.png").write_bytes(good)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "inside.png").write_bytes(good)
    (tmp_path / "set" / "inside.png").rename(tmp_path / "set" / "inside.bin")
    for place in (tmp_path / "set" / "archive.bin", tmp_path / "archive.bin"):
        with zipfile.ZipFile(place, "w") as archive:
            archive.writestr("a.png", good)
    paths = [
        "gone.png", "https://example.org/a.png", tmp_path / "outside.png", f"zip://a.png::{tmp_path}/archive.bin",
        tmp_path / "set" / "inside.bin", f"zip://a.png::{tmp_path}/set/archive.bin",
    ]  # fmt: skip
    cells = [{"bytes": good, "path": None}, None, *({"bytes": None, "path": str(p)} for p in paths)]
    params = labelled_parquet(tmp_path / "data", [0] * 8, cells)
    (tmp_path / "data" / "data.parquet").rename(tmp_path / "set" / "data.parquet")
    params |= {"dataset": str(tmp_path / "set"), "label_column": None, "streaming": streaming}
    found = [item.content for item in read_images(params)[1]]
    assert found[0] == found[6] == found[7] == good
    assert [str(why) for why in found[1:6]] == [
        "a null",
        "gone.png is outside the data set's folder, so that no digest covers it",
        "an address, https://example.org/a.png: download the images first",
        f"{tmp_path}/outside.png is outside the data set's folder, so that no digest covers it",
        f"zip://a.png::{tmp_path}/archive.bin is outside the data set's folder, so that no digest covers it",
    ]
    assert prepare_image(Item("a", 0, "a null"), PREPROCESSING) == "a null"


def test_a_column_that_holds_no_images_is_refused(tmp_path: Path) -> None:
    params = labelled_parquet(tmp_path / "set", [1, 2], [7, 8])
    with pytest.raises(UserError, match="column 'image' does not hold images, but Value"):
        read_images(params)


def test_exif_that_is_no_number_is_a_reason_not_an_end() -> None:
    """Text where a number belongs, in every tag that is about the picture's shape."""
    found = []
    for tag in range(0x0100, 0x0140):
        exif = Image.Exif()
        exif[0x0112] = 6
        exif[tag] = "text"
        try:
            content = encoded(picture(20, 20), "JPEG", exif=exif)
        except (TypeError, ValueError, struct.error):  # Pillow does not write it
            continue
        found.append(prepare_image(Item("a", 0, content), PREPROCESSING))
        assert isinstance(found[-1], str | Ready)
    assert len(found) > 20


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_exif_that_is_cut_off_or_random_is_a_reason_not_an_end() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 3, "a picture"
    whole = exif.tobytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        held = bytearray(whole)
        for at in rng.integers(6, len(held), 3):
            held[at] = rng.integers(256)
        content = encoded(picture(8, 8), "JPEG", exif=bytes(held[: rng.integers(8, len(held) + 1)]))
        assert isinstance(prepare_image(Item("a", 0, content), PREPROCESSING), str | Ready)


def test_a_thin_image_needs_no_more_memory_than_another() -> None:
    content = encoded(Image.new("RGB", (1, 65000), (5, 80, 200)), "PNG")
    large = replace(PREPROCESSING, size=224, crop=(224, 224), height=224, width=224)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = prepare_image(Item("a", 0, content), large)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert isinstance(found, Ready)
    assert (found.pixels == (5, 80, 200)).all()
    assert found.pixels.shape == (224, 224, 3)
    assert grown < 100_000  # kB; resized whole, it would be 9.8 GB


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_says_it_is_huge_is_not_decoded() -> None:
    header = encoded(Image.new("L", (8, 8)), "PNG")
    size = struct.pack(">II", 10_000, 10_000)
    chunk = b"IHDR" + size + header[24:29]
    huge = header[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + header[33:]
    found = prepare_image(Item("a", 0, huge), PREPROCESSING)
    assert found == "10000 x 10000 pixels, more than 67108864 in all"


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
