"""Stand-ins are read by the same code as what they stand for, and have its hook points, columns and classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeflow.complexity.scorers import read_table
from saeflow.rehearsal.sources import WIDTH, StandIn, default_classes
from saeflow.rehearsal.stand_ins import TOKENIZERS, write_stand_ins
from saeflow.shapes import config_shape
from saeflow.sources.decoding import as_rgb
from saeflow.sources.documents import read_documents
from saeflow.sources.hook_points import capture
from saeflow.sources.images import read_images
from saeflow.sources.models import load_model, load_tokenizer
from saeflow.sources.preprocessing import load_preprocessing

PIN = "0" * 40


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub cannot be reached, and the cache is not the user's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def written(folder: Path, kind: str, path: str, **recipe: Any) -> Path:
    write_stand_ins([StandIn(kind, path, recipe, "what it stands for")], folder)
    return folder / path


@pytest.mark.parametrize("model_type", sorted(TOKENIZERS))
def test_every_family_has_a_model_with_its_hook_points(model_type: str, tmp_path: Path) -> None:
    folder = written(tmp_path, "models", "model", model_type=model_type, blocks=3)
    assert config_shape(folder / "config.json").model_type == model_type
    assert config_shape(folder / "config.json").n_blocks == 3
    model, tokenizer = load_model(folder, "cpu"), load_tokenizer(folder)
    text = "A class's namespace is a dictionary — naïve, ✓ and 'quoted'.\n  Two  spaces."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert max(ids) < model.config.get_text_config().vocab_size
    assert tokenizer.eos_token_id is not None
    points = [f"blocks.2.{place}" for place in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    found = capture(model, points, torch.tensor([ids[:20]]))
    assert {x.shape for x in found.values()} == {(1, 20, WIDTH)}
    assert all(bool(x.isfinite().all()) and float(x.std()) > 0 for x in found.values())


def test_clip_reads_images_and_prompts(tmp_path: Path) -> None:
    texts = ["a photo of a {}, a pet.", "golden retriever", "aéroplane", "McDonnell-Douglas MD-11"]
    folder = written(tmp_path, "models", "model", model_type="clip", blocks=3, texts=texts)
    model, tokenizer = load_model(folder, "cpu"), load_tokenizer(folder)
    preprocessing = load_preprocessing(folder)
    pixels = torch.zeros(2, 3, preprocessing.height, preprocessing.width)
    found = capture(model, ["vision.blocks.2.resid_post", "vision.embedding"], pixels)
    assert found["vision.blocks.2.resid_post"].shape == (2, 17, WIDTH)
    assert found["vision.embedding"].shape == (2, WIDTH)
    words = tokenizer("a photo of a golden retriever.")["input_ids"]
    assert len(words) <= 10  # a token a word, and the ends


def test_the_same_stand_in_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        written(tmp_path / name, "models", "inputs/m", model_type="gpt2", blocks=2)
        written(
            tmp_path / name, "images", "inputs/i", image_column="img", label_column="fine", split="train",
            name=None, classes=[], count=5,
        )  # fmt: skip
    one, two = (
        {
            p.relative_to(tmp_path / n).as_posix(): p.read_bytes()
            for p in (tmp_path / n).rglob("*")
            if p.is_file()
        }
        for n in ("one", "two")
    )
    assert one == two
    assert len(one) >= 5


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("name", [None, "wikitext-103-raw-v1"])
def test_text_comes_from_the_column_split_and_configuration(
    streaming: bool, name: str | None, tmp_path: Path
) -> None:
    folder = written(tmp_path, "texts", "t", column="body", split="validation", name=name)
    text = {
        "dataset": str(folder), "name": name, "revision": PIN, "split": "validation", "column": "body",
        "streaming": streaming,
    }  # fmt: skip
    documents = [document.text for document in read_documents(text)]
    assert len(documents) > 50
    assert len(set(documents)) == len(documents)
    assert sum(map(len, documents)) > 50_000


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_text_comes_from_files(suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path, "documents", f"d{suffix}", column="body")
    text = {"files": [str(path)], "column": "body"}
    documents = [document.text for document in read_documents(text)]
    assert sum(map(len, documents)) > 50_000


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("label_column", "classes"), [(None, []), ("variant", []), ("label", ["a/b", "c d", "é"])]
)
def test_images_have_the_columns_and_classes(
    label_column: str | None, classes: list[str], streaming: bool, tmp_path: Path
) -> None:
    import io

    from PIL import Image

    folder = written(
        tmp_path, "images", "i", image_column="jpg", label_column=label_column, split="test", name=None,
        classes=classes, count=9,
    )  # fmt: skip
    named, items = read_images(
        {
            "dataset": str(folder), "name": None, "revision": PIN, "split": "test", "image_column": "jpg",
            "label_column": label_column, "streaming": streaming, "shuffle_seed": 0,
        }
    )  # fmt: skip
    found = list(items)
    assert len({item.content for item in found}) == 9
    expected = None if label_column is None else classes or default_classes()
    assert named == expected
    if expected is None:
        assert {item.label for item in found} == {-1}
    else:
        assert {item.label for item in found} == set(range(len(expected)))
    pixels = np.asarray(as_rgb(Image.open(io.BytesIO(bytes(found[0].content)))))
    assert pixels.std() > 5


def test_a_folder_of_images_has_a_subfolder_a_class(tmp_path: Path) -> None:
    folder = written(tmp_path, "folders", "f", classes=["cat", "dog"], count=6)
    named, items = read_images({"folder": str(folder)})
    assert named == ["cat", "dog"]
    assert len(list(items)) == 6


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_scores_every_context_within_the_range(suffix: str, tmp_path: Path) -> None:
    contexts = {"train": 7, "evaluation": 3}
    path = written(
        tmp_path, "tables", f"t{suffix}", column="score", range=[2, 5], contexts=contexts
    )
    table = read_table(path, "score")
    assert table.groupby("split")["context"].apply(list).to_dict() == {
        "train": list(range(7)), "evaluation": list(range(3))
    }  # fmt: skip
    assert table["score"].between(2, 5).all()


@pytest.mark.parametrize("library", ["saelens", "dictionary_learning"])
def test_an_imported_sae_is_taken_over(library: str, tmp_path: Path) -> None:
    from saeflow.exchange import import_sae
    from saeflow.saes import load

    point = "blocks.3.resid_post"
    folder = written(tmp_path, "imports", "s", library=library, hook_point=point)
    out = tmp_path / "out"
    out.mkdir()
    about = {"name": "s/h/e/l", "entry": "e", "source": "s", "hook_point": point, "seed": 0}
    import_sae(folder, library, about, out)
    assert load(out).d_in == WIDTH


def test_a_stand_in_that_is_there_is_left_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "tables", "t.csv", column="a", range=[0, 1], contexts={"train": 1})
    path.write_text("mine")
    written(tmp_path, "tables", "t.csv", column="a", range=[0, 1], contexts={"train": 1})
    assert path.read_text() == "mine"
