"""The vision source on a real small CLIP, against the library's own forward pass."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from saeflow.errors import UserError
from saeflow.sources import check_source, open_source, prepare_inputs
from saeflow.sources.clip_training import make_tokenizer
from saeflow.sources.hook_points import capture, hook, resume_at, run_from, splice
from saeflow.sources.labelled import prepare_labelled
from saeflow.sources.models import fetch_model, load_model
from saeflow.sources.preprocessing import load_preprocessing, normalised

BLOCKS = 3
TRAINED = {
    "scenes": {"seed": 0, "smallest": 0, "largest": 3}, "examples": 32, "pairs": 32, "batch_size": 8,
    "lr": 1e-3, "width": 32, "layers": BLOCKS, "patch_size": 16, "seed": 0,
}  # fmt: skip
SCENES = {"scenes": {"seed": 1, "smallest": 0, "largest": 3}}
POINTS = [f"vision.blocks.{b}.{p}" for b in (0, 1, 2) for p in ("resid_pre", "attn_out", "mlp_out", "resid_post")]  # fmt: skip


def params(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "vision", "model": {"trained": TRAINED}, "hook_points": ["vision.blocks.1.resid_post"],
        "images": SCENES, "unreadable_share": 0, "evaluation_share": 0.4, "tokens": "all",
        "max_norm_multiple": 10, "forward_batch": 4, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "model"
    folder.mkdir()
    fetch_model({"trained": TRAINED}, ["vision.blocks.1.resid_post"], folder)
    return folder


def opened(model: Path, rows: dict[str, int], **changes: Any) -> Any:
    folder = model.parent
    (folder / "inputs").mkdir(exist_ok=True)
    prepare_inputs(params(**changes), rows, model, folder / "inputs", 2)
    return open_source(params(**changes), folder, "cpu")


def test_training_again_gives_the_same_weights(model: Path, tmp_path: Path) -> None:
    fetch_model({"trained": TRAINED}, [], tmp_path)
    one, two = (CLIPModel.from_pretrained(folder).state_dict() for folder in (model, tmp_path))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_folder_is_an_ordinary_one(model: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(model)
    ids = tokenizer("a photo of a red circle")["input_ids"]
    assert len(ids) == 8  # every word of the captions is one token
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(tokenizer("Zebra, 7!")["input_ids"][1:-1]).split() == [
        "zebra",
        ",",
        "7",
        "!",
    ]
    assert json.loads((model / "config.json").read_text())["architectures"] == ["CLIPModel"]
    assert not list(model.glob("*.bin"))


def reference(model: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every hook point by plain arithmetic on the library's modules."""
    body = model.vision_model
    x = body.pre_layrnorm(body.embeddings(pixels))
    found = {}
    for number, block in enumerate(body.encoder.layers):
        name = f"vision.blocks.{number}"
        attention = block.self_attn(block.layer_norm1(x), attention_mask=None)[0]
        mlp = block.mlp(block.layer_norm2(x + attention))
        found |= {
            f"{name}.resid_pre": x, f"{name}.attn_out": attention, f"{name}.mlp_out": mlp,
            f"{name}.resid_post": x + attention + mlp,
        }  # fmt: skip
        x = found[f"{name}.resid_post"]
    found["vision.embedding"] = model.visual_projection(body.post_layernorm(x[:, 0]))
    return found


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_every_word_of_captions_is_one_token() -> None:
    """Words as CLIP splits them, written out by hand: letters, single digits, punctuation, endings."""
    captions = ["A dog's ball, (tiny) cafés", "red-blue!", "12 don't... <|endoftext|> naïve"]
    tokenizer = make_tokenizer(captions)
    expected = [
        ["a", "dog", "'s", "ball", ",", "(", "tiny", ")", "cafés"],
        ["red", "-", "blue", "!"],
        ["1", "2", "don", "'t", "...", "<|endoftext|>", "naïve"],
    ]
    for caption, words in zip(captions, expected, strict=True):
        ids = tokenizer(caption, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(words)
        assert [tokenizer.decode([token]).strip() for token in ids] == words


def test_every_hook_point_of_the_image_tower(model: Path, pixels: torch.Tensor) -> None:
    loaded: Any = load_model(model, "cpu")
    with torch.no_grad():
        expected = reference(loaded, pixels)
        for name in [*POINTS, "vision.embedding"]:
            got = capture(loaded, [name], pixels)[name]
            torch.testing.assert_close(got, expected[name], rtol=1e-5, atol=1e-5)
        several = capture(loaded, [POINTS[1], POINTS[7], "vision.embedding"], pixels)
    assert list(several) == [POINTS[1], POINTS[7], "vision.embedding"]
    official = loaded.get_image_features(pixels).pooler_output
    torch.testing.assert_close(several["vision.embedding"], official, rtol=0, atol=0)


@pytest.mark.parametrize("name", POINTS)
def test_running_on_from_a_hook_point_is_the_model_with_it_replaced(
    model: Path, pixels: torch.Tensor, name: str
) -> None:
    loaded: Any = load_model(model, "cpu")
    block_input = f"{name.rsplit('.', 1)[0]}.resid_pre"
    found = capture(loaded, [name, block_input] if name != block_input else [name], pixels)
    other = torch.randn(found[name].shape, generator=torch.Generator().manual_seed(1))
    with splice(loaded, name, lambda x: other):
        expected = loaded.get_image_features(pixels).pooler_output
    got = run_from(loaded, name, found[block_input], None, lambda x: other)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    resumed = resume_at(loaded, name)
    if resumed is not None:
        got = run_from(loaded, resumed, other, None, lambda x: x)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_an_sae_is_spliced_into_the_image_tower(model: Path, pixels: torch.Tensor) -> None:
    loaded: Any = load_model(model, "cpu")
    clean = loaded.get_image_features(pixels).pooler_output
    with hook(loaded, "vision.blocks.1.resid_post", torch.nn.Identity()):
        assert torch.equal(loaded.get_image_features(pixels).pooler_output, clean)
    with hook(loaded, "vision.embedding", torch.nn.Hardtanh(0, 0.1)):
        got = loaded.get_image_features(pixels).pooler_output
    torch.testing.assert_close(got, clean.clamp(0, 0.1))


@pytest.mark.parametrize(("tokens", "positions"), [("all", 17), ("cls", 1), ("patches", 16)])
def test_rows_are_the_librarys_hidden_states(model: Path, tokens: str, positions: int) -> None:
    source = opened(model, {"train": 60, "evaluation": 40}, tokens=tokens)
    loaded: Any = load_model(model, "cpu")
    block = source.block("train", 0, 3)
    given = normalised(torch.from_numpy(np.array(source.inputs("train")[:4])), source.preprocessing)
    hidden = loaded.vision_model(given, output_hidden_states=True).hidden_states[2][:3]
    part = {"all": hidden, "cls": hidden[:, :1], "patches": hidden[:, 1:]}[tokens]
    got = block.activations["vision.blocks.1.resid_post"]
    torch.testing.assert_close(got, part.reshape(-1, 32), rtol=1e-5, atol=1e-5)
    assert block.columns["context"].tolist() == [i for i in range(3) for _ in range(positions)]
    assert block.columns["position"].min() == (1 if tokens == "patches" else 0)
    assert source.rows_per_context == positions


def test_bits_do_not_depend_on_how_images_are_asked_for(model: Path) -> None:
    source = opened(model, {"train": 200, "evaluation": 40})
    whole = source.block("train", 0, 9)
    parts = [source.block("train", start, stop) for start, stop in ((0, 2), (2, 7), (7, 9))]
    name = "vision.blocks.1.resid_post"
    assert torch.equal(whole.activations[name], torch.cat([p.activations[name] for p in parts]))
    for column, values in whole.columns.items():
        assert np.array_equal(values, np.concatenate([p.columns[column] for p in parts])), column


def test_labels_and_truth_lie_beside_each_row(model: Path) -> None:
    from saeflow.sources import scenes

    source = opened(model, {"train": 400, "evaluation": 40})
    columns = source.block("train", 0, 10).columns
    ids = (model.parent / "inputs" / "train.csv").read_text().splitlines()[1:]
    for image in range(10):
        mine = columns["context"] == image
        number = int(ids[image].split(",")[1].rsplit("-", 1)[1])
        scene = scenes.draw_scene(SCENES["scenes"], number)
        assert set(columns["label"][mine]) == {scene.label}
        assert set(columns["objects"][mine]) == {len(scene.things)}
        _, owner = scenes.render(scene)
        cover = columns["cover"][mine]
        assert cover[0] == -1
        for patch, label in enumerate(cover[1:]):
            row, column = divmod(patch, 4)
            own = owner[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            if label >= 0:
                assert label in {scene.label_of(scene.things[i]) for i in own[own >= 0]}
            else:
                assert (own >= 0).sum() <= own.size / 2


def test_splits_share_no_image(model: Path) -> None:
    opened(model, {"train": 800, "evaluation": 800})
    inputs = model.parent / "inputs"
    ids = [set((inputs / f"{split}.csv").read_text().splitlines()[1:]) for split in ("train", "evaluation")]  # fmt: skip
    names = [{line.split(",")[1] for line in lines} for lines in ids]
    assert not names[0] & names[1]
    assert [len(found) for found in names] == [48, 48]


def test_the_embedding_is_one_row_an_image(model: Path) -> None:
    changes: dict[str, Any] = {"hook_points": ["vision.embedding"], "tokens": "cls"}
    source = opened(model, {"train": 12, "evaluation": 8}, **changes)
    assert source.d_in == {"vision.embedding": 32}
    block = source.block("train", 0, 12)
    loaded: Any = load_model(model, "cpu")
    given = normalised(torch.from_numpy(np.array(source.inputs("train")[:4])), source.preprocessing)
    expected = loaded.get_image_features(given).pooler_output
    torch.testing.assert_close(block.activations["vision.embedding"][:4], expected)
    with pytest.raises(UserError, match=r"expected cls with vision.embedding"):
        check_source("s", params(hook_points=["vision.embedding"]), model.parent)


def test_a_block_that_the_tower_lacks_is_refused(model: Path) -> None:
    with pytest.raises(UserError, match=r"has 3 blocks \(0..2\), found"):
        check_source("s", params(hook_points=["vision.blocks.3.resid_post"]), model.parent)
    with pytest.raises(UserError, match=r"expected hook points of its image tower"):
        fetch_model({"folder": str(model)}, ["blocks.0.resid_post"], model.parent)


def make_set(folder: Path, counts: dict[str, int], *, broken: int = 0) -> Path:
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture = Image.fromarray(rng.integers(0, 255, (50, 70, 3), np.uint8))
            picture.save(folder / name / f"{number}.png")
    for number in range(broken):
        (folder / next(iter(counts)) / f"broken{number}.png").write_bytes(b"no image")
    return folder


def test_unreadable_images_are_skipped_and_named(model: Path, tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", {"a": 30, "b": 30}, broken=3)
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    source = params(images={"folder": str(folder)}, tokens="cls", unreadable_share=0.1)
    prepare_inputs(source, {"train": 20, "evaluation": 10}, model, inputs, 2)
    facts = json.loads((inputs / "images.json").read_text())
    assert facts["classes"] == ["a", "b"]
    assert all("broken" in name for name in facts["unreadable"])
    assert np.load(inputs / "train.npy").shape == (20, 64, 64, 3)
    assert "broken" not in (inputs / "train.csv").read_text()
    with pytest.raises(UserError, match="more than unreadable_share"):
        prepare_inputs(
            {**source, "unreadable_share": 0}, {"train": 30, "evaluation": 10}, model, inputs
        )
    with pytest.raises(UserError, match=r"they give .* of the .* split"):
        prepare_inputs(
            {**source, "unreadable_share": 1}, {"train": 90, "evaluation": 9}, model, inputs
        )


def labelled(folder: Path, **changes: Any) -> dict[str, Any]:
    images = {"folder": str(folder)}
    return {
        "train": images, "test": images, "per_class": {"train": 2, "test": 3}, "class_names": None,
        "templates": ["a photo of a {}"], "unreadable_share": 0, **changes,
    }  # fmt: skip


def test_a_labelled_set_has_so_many_of_each_class(model: Path, tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", {"golden_retriever": 5, "cat": 5})
    prepare_labelled(labelled(folder), model, tmp_path, 2)
    assert np.bincount(np.load(tmp_path / "train_labels.npy")).tolist() == [2, 2]
    assert np.bincount(np.load(tmp_path / "test_labels.npy")).tolist() == [3, 3]
    facts = json.loads((tmp_path / "images.json").read_text())
    assert facts["classes"] == ["cat", "golden retriever"]
    assert (facts["train_images"], facts["test_images"]) == (4, 6)


def test_train_and_test_of_a_labelled_set_share_no_image(model: Path, tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", {"a": 5, "b": 6})
    shutil.copyfile(folder / "a" / "0.png", folder / "a" / "again.png")
    read = prepare_labelled(labelled(folder), model, tmp_path, 2)
    pixels = {split: np.load(tmp_path / f"{split}.npy") for split in ("train", "test")}
    assert (
        {split: len(x) for split, x in pixels.items()} == read["images"] == {"train": 4, "test": 6}
    )
    found = {split: {image.tobytes() for image in x} for split, x in pixels.items()}
    assert not found["train"] & found["test"]
    assert read["left_out"]["an image of train"] >= 4
    assert read["in_both"] == 0
    copy = shutil.copytree(folder, tmp_path / "copy")  # another collection of the same images
    apart = labelled(folder, test={"folder": str(copy)}, per_class={"train": 9, "test": 9})
    assert prepare_labelled(apart, model, tmp_path)["in_both"] == 11  # one stands there twice
    most = labelled(folder, per_class={"train": 6, "test": 1})  # all of a, and not all of b
    (folder / "b" / "6.png").write_bytes((folder / "b" / "5.png").read_bytes() + b" ")
    with pytest.raises(
        UserError, match=r"test: no images of 1 of 2 classes, such as a \(\d+ are images of train"
    ):
        prepare_labelled(most, model, tmp_path)
    every = labelled(folder, per_class={"train": 9, "test": 1})
    with pytest.raises(UserError, match=r"test: every image is one of train too"):
        prepare_labelled(every, model, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"templates": ["a photo"]}, "expected one {} for the class in each, found 'a photo'"),
        ({"templates": ["{} of {}"]}, "expected one {}"),
        ({"templates": ["a {0}"]}, "expected one {}"),
        ({"class_names": ["one"]}, "expected the classes a, b, found one"),
    ],
)
def test_a_labelled_set_that_makes_no_sense(
    model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = make_set(tmp_path / "set", {"a": 3, "b": 3})
    with pytest.raises(UserError, match=message):
        prepare_labelled(labelled(folder, **changes), model, tmp_path)


@pytest.mark.parametrize(
    ("classes", "names", "message"),
    [
        (["cat", "dog"], ["dog", "cat"], "names of the classes in another order"),
        (["0", "2"], ["no", "yes"], "with gaps between"),
        (["class2", "class10"], ["two", "ten"], "another order as text than by their numbers"),
    ],
)
def test_class_names_whose_order_is_in_doubt_are_refused(
    classes: list[str], names: list[str], message: str, model: Path, tmp_path: Path
) -> None:
    folder = make_set(tmp_path / "set", dict.fromkeys(classes, 3))
    with pytest.raises(UserError, match=message):
        prepare_labelled(labelled(folder, class_names=names), model, tmp_path)


def test_class_names_follow_the_numbers_of_the_classes(model: Path, tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", {str(number): 3 for number in range(12)})
    picture = folder / "0" / "0.png"
    picture.rename(folder / "beside.png")
    names = [f"name {number}" for number in range(12)]
    given = labelled(folder, class_names=names, per_class={"train": 1, "test": 1})
    prepare_labelled(given, model, tmp_path)
    classes = json.loads((tmp_path / "images.json").read_text())["classes"]
    assert classes == names
    table = (tmp_path / "test.csv").read_text().splitlines()[1:]
    assert len(table) == 12
    for line in table:
        _, place, label = line.split(",")
        assert classes[int(label)] == f"name {place.split('/')[0]}"


def test_sets_without_classes_or_with_different_ones(model: Path, tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", {"a": 3, "b": 3})
    with pytest.raises(UserError, match="expected images with classes"):
        prepare_labelled(labelled(folder / "a"), model, tmp_path)
    other = make_set(tmp_path / "other", {"a": 3, "c": 3})
    with pytest.raises(UserError, match="test: expected the classes a, b, found a, c"):
        prepare_labelled(labelled(folder, test={"folder": str(other)}), model, tmp_path)
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="no images of 1 of 3 classes, such as empty"):
        prepare_labelled(labelled(folder), model, tmp_path)


def test_preprocessing_must_fit_the_model(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    path = copy / "preprocessor_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"crop_size": {"height": 32, "width": 32}}))
    with pytest.raises(UserError, match=r"expected images of 64 pixels .* found a crop of 32 x 32"):
        load_preprocessing(copy)
    path.unlink()
    with pytest.raises(UserError, match="no preprocessing for images"):
        load_preprocessing(copy)


def test_a_module_of_the_image_tower_has_its_own_width(model: Path) -> None:
    point = "vision.module.vision_model.encoder.layers.1.mlp.fc1.output"
    source = opened(model, {"train": 20}, hook_points=[point])
    width = source.model.vision_model.encoder.layers[1].mlp.fc1.out_features
    assert source.d_in == {point: width}
    assert source.block("train", 0, 1).activations[point].shape[1] == width
