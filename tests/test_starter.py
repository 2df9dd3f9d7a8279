"""`saeflow init`: what it writes for which data, and what it refuses; the file's run is in tests/workflow."""

import os
import pydoc_data.topics
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import CLIPModel

from saeflow.config import load_params
from saeflow.errors import UserError
from saeflow.plan import Plan
from saeflow.preflight import checked_plan
from saeflow.sources import prepare_inputs
from saeflow.sources.clip_training import clip_config, make_tokenizer, save_clip
from saeflow.sources.documents import read_documents
from saeflow.starter import Asked, write_first

from .sources.fake_hub import NAME, SHA, serving
from .sources.test_towers import saved
from .sources.test_wrappers import processor_file, wrapper
from .workflow.test_text import make_model

DOCUMENTS = list(pydoc_data.topics.topics.values())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "My GPT_2"
    make_model(folder, DOCUMENTS)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "clip"
    folder.mkdir()
    tokenizer = make_tokenizer(["a red circle"])
    chosen = {"width": 16, "layers": 3, "patch_size": 16}
    config = clip_config(chosen, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    save_clip(CLIPModel(config), tokenizer, folder)
    return folder


def texts(folder: Path, number: int) -> Path:
    """A folder with a text file and a table of JSON lines."""
    (folder / "texts").mkdir()
    (folder / "texts/a.txt").write_text("\n\n".join(DOCUMENTS[:number]), encoding="utf-8")
    return folder / "texts"


def test_all_that_the_text_gives_is_asked_for_and_no_more(model: Path, tmp_path: Path) -> None:
    """The reference is the packing itself: it gives these rows, and of training not one context more."""
    write_first(Asked(str(model), text=(texts(tmp_path, 30),)), tmp_path / "mine")
    params = load_params(tmp_path / "mine/params.yaml")
    (name,) = params["sources"]
    assert name == "my-gpt-2"
    source, store = params["sources"][name], params["stores"][name]
    rows = {split: store[f"{split}_rows"] for split in ("train", "evaluation")}
    (tmp_path / "enough").mkdir()
    prepare_inputs(source, rows, model, tmp_path / "enough")
    (tmp_path / "more").mkdir()
    with pytest.raises(UserError, match="for the train split"):
        prepare_inputs(source, rows | {"train": rows["train"] + 1}, model, tmp_path / "more")


def test_the_file_is_short_valid_and_allowed_to_run(model: Path, tmp_path: Path) -> None:
    said = write_first(Asked(str(model), text=(texts(tmp_path, 30),)), tmp_path / "mine")
    path = tmp_path / "mine/params.yaml"
    assert str(path) in said
    assert len(path.read_text().splitlines()) <= 30
    plan = checked_plan(load_params(path))
    assert {run.variant for run in plan.runs.values()} == {"topk", "batch_topk", "soft_topk"}
    for run in plan.runs.values():
        assert run.training.steps >= 400
        assert run.training.lr_warmup_steps < run.training.steps / 10


def test_names_of_many_files_stand_one_below_the_other(model: Path, tmp_path: Path) -> None:
    folder = texts(tmp_path, 30)
    for number in range(9):
        (folder / f"part-{number}.txt").write_text("\n\n".join(DOCUMENTS[number::9]), "utf-8")
    write_first(Asked(str(model), text=(folder,)), tmp_path / "mine")
    path = tmp_path / "mine/params.yaml"
    (source,) = load_params(path)["sources"].values()
    assert len(source["text"]["files"]) == 10
    lines = path.read_text("utf-8").splitlines()
    assert sum(line.strip().startswith("- ") for line in lines) == 10


def test_the_encoding_of_a_text_is_asked_for_once(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.txt"
    path.write_text("\n\n".join(f"{text} — déjà vu" for text in DOCUMENTS[:30]), encoding="cp1252")
    write_first(Asked(str(model), text=(path,), encoding="cp1252"), tmp_path / "mine")
    plan = checked_plan(load_params(tmp_path / "mine/params.yaml"))
    (source,) = plan.params["sources"].values()
    assert source["text"]["encoding"] == "cp1252"
    assert any("déjà vu" in document.text for document in read_documents(source["text"]))


def test_images_of_a_folder(clip: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(60):
        place = tmp_path / "images" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    write_first(Asked(str(clip), images=tmp_path / "images"), tmp_path / "mine")
    params = load_params(tmp_path / "mine/params.yaml")
    checked_plan(params)
    source, store = params["sources"]["clip"], params["stores"]["clip"]
    assert source["hook_points"] == ["vision.blocks.1.resid_post"]
    rows = store["train_rows"] + store["evaluation_rows"]
    assert rows == 60 * 17  # every image, its CLS token and 4 x 4 patches
    (tmp_path / "inputs").mkdir()
    wanted = {split: store[f"{split}_rows"] for split in ("train", "evaluation")}
    prepare_inputs(source, wanted, clip, tmp_path / "inputs")


@pytest.mark.parametrize(
    ("name", "tokens", "rows"),
    [
        ("siglip", "patches", 16),
        ("dinov2_with_registers", "patches", 16),
        ("dinov2", "all", 17),
        ("vit", "all", 17),
    ],
)
def test_an_images_rows_are_those_that_its_tower_has(
    name: str, tokens: str, rows: int, tmp_path: Path
) -> None:
    """DINOv2 is released for larger images than its preprocessing gives: the rows are those of the crop."""
    sizes = {"image_size": 64} if name == "dinov2" else {}
    local = saved(name, tmp_path / "tower", **sizes)
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(60):
        pixels = random.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    write_first(Asked(str(local), images=tmp_path / "images"), tmp_path / "mine")
    params = load_params(tmp_path / "mine/params.yaml")
    checked_plan(params)
    source, store = params["sources"]["tower"], params["stores"]["tower"]
    assert source["tokens"] == tokens
    assert store["train_rows"] + store["evaluation_rows"] == 60 * rows
    (tmp_path / "inputs").mkdir()
    wanted = {split: store[f"{split}_rows"] for split in ("train", "evaluation")}
    prepare_inputs(source, wanted, local, tmp_path / "inputs")


def test_a_tower_of_images_of_any_size_gets_one(tmp_path: Path) -> None:
    """Qwen2.5-VL's: the largest square below 16 merged patches that its own processor would leave as it is."""
    local = tmp_path / "tower"
    wrapper("qwen2_5_vl").save_pretrained(local)
    limits = {"shortest_edge": 256, "longest_edge": 1100}
    (local / "preprocessor_config.json").write_text(processor_file("Qwen2VL", size=limits, patch_size=4))  # fmt: skip
    (tmp_path / "images").mkdir()
    for number in range(60):
        Image.new("RGB", (40, 30 + number)).save(tmp_path / "images" / f"{number}.png")
    write_first(Asked(str(local), images=tmp_path / "images"), tmp_path / "mine")
    params = load_params(tmp_path / "mine/params.yaml")
    checked_plan(params)
    source, store = params["sources"]["tower"], params["stores"]["tower"]
    assert (source["model"]["image_size"], source["tokens"]) == (32, "patches")
    assert source["hook_points"] == ["vision.blocks.1.resid_post"]
    assert store["train_rows"] + store["evaluation_rows"] == 60 * 64


def test_a_model_of_the_hub_is_pinned_at_its_newest_commit(model: Path, tmp_path: Path) -> None:
    with serving(model, "none", "") as address:
        environment = os.environ | {
            "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        asked = [
            "--text",
            str(texts(tmp_path, 30)),
            "--model",
            NAME,
            "--hook-point",
            "blocks.1.mlp_out",
        ]
        subprocess.run(
            [sys.executable, "-m", "saeflow", "init", str(tmp_path / "mine"), *asked], env=environment, check=True
        )  # fmt: skip
    params = yaml.safe_load((tmp_path / "mine/params.yaml").read_text())
    (source,) = params["sources"].values()
    assert source["model"] == {"hub": NAME, "revision": SHA}
    assert source["hook_points"] == ["blocks.1.mlp_out"]


def test_what_cannot_be_used_is_one_line_and_nothing_is_written(
    model: Path, clip: Path, tmp_path: Path
) -> None:
    text = texts(tmp_path, 30)
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "empty").mkdir()
    (tmp_path / "old.txt").write_text("é" * 9000, encoding="latin-1")
    own, truncated = str(model), Path(shutil.copytree(model, tmp_path / "truncated"))
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    cases = [
        (Asked(own), "expected one of --text, --images and --dataset, found none"),
        (Asked(own, text=(text,), dataset="a/b"), "found 2"),
        (Asked(own, images=text), "expected a model of images for --images"),
        (Asked(str(clip), text=(text,)), "expected a language model for --text"),
        (Asked("./nowhere", text=(text,)), "expected a folder that save_pretrained wrote"),
        (Asked(own, text=(tmp_path / "nothing.txt",)), "no such file or folder"),
        (Asked(own, text=(tmp_path / "empty",)), "found none"),
        (Asked(own, text=(tmp_path / "short.txt",)), "to train on"),
        (Asked(own, text=(text,), hook_point="blocks.9.resid_post"), "4 blocks"),
        (Asked(own, text=(text,), hook_point="attic"), "found 'attic'"),
        (Asked(own, dataset="a/b", encoding="latin-1"), "--encoding: expected --text"),
        (Asked(own, text=(text,), encoding="latin-l"), "expected an encoding that Python knows"),
        (
            Asked(own, text=(tmp_path / "old.txt",)),
            r"Set text.encoding .of .saeflow init.: --encoding. to the file's own",
        ),
        (Asked(own, dataset=str(text)), "expected OWNER/NAME of the hub"),
        (Asked(str(truncated), text=(text,)), "file of weights is damaged or not whole"),
    ]
    for asked, said in cases:
        with pytest.raises(UserError, match=said):
            write_first(asked, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    write_first(Asked(own, text=(text,)), tmp_path / "mine")
    before = (tmp_path / "mine/params.yaml").read_text()
    with pytest.raises(UserError, match="it is there already"):
        write_first(Asked(own, text=(text,)), tmp_path / "mine")
    assert (tmp_path / "mine/params.yaml").read_text() == before
    assert len(Plan(load_params(tmp_path / "mine/params.yaml")).runs) == 6


def test_a_run_of_a_file_that_is_no_yaml_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("sources: {a: 1\nstores: [\n")
    done = subprocess.run(
        [sys.executable, "-m", "saeflow", "run", "--folder", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert str(path) in line
    assert "line 2" in line
    assert [one.name for one in tmp_path.iterdir()] == ["params.yaml"]
