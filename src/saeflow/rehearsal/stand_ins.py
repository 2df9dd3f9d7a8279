"""Stand-ins for models and data: small random models of the same families, local text and generated images."""

import csv
import json
import logging
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.files import replace_folder
from saeflow.rehearsal.scale import D_SAE
from saeflow.rehearsal.sources import PATCH_SIZE, WIDTH, StandIn, default_classes
from saeflow.sources import english, scenes
from saeflow.sources.clip_training import clip_config, make_tokenizer, save_clip

logger = logging.getLogger(__name__)

VOCABULARY = 1200
_TOKENIZER_CHARACTERS = 150_000
_DOCUMENTS, _CHARACTERS = 120, 2000
"""Documents of a data set, and characters of each at most."""
_POSITIONS = 1024
_TEXT_LAYERS, _TEXT_POSITIONS = 2, 77

# What a family's tokenizer is made of: BOS and EOS (None where it has none), and whether a space is a
# letter of its own (SentencePiece) or part of a byte-level piece.
_END_OF_TEXT = ("<|endoftext|>", "<|endoftext|>", False)
_SENTENCEPIECE = ("<bos>", "<eos>", True)
TOKENIZERS: dict[str, tuple[str | None, str, bool]] = {
    "gemma": _SENTENCEPIECE,
    "gemma2": _SENTENCEPIECE,
    "gemma3": _SENTENCEPIECE,
    "gemma3_text": _SENTENCEPIECE,
    "gpt2": _END_OF_TEXT,
    "gpt_neox": _END_OF_TEXT,
    "llama": ("<s>", "</s>", False),
    "mistral": ("<s>", "</s>", True),
    "qwen2": (None, "<|endoftext|>", False),
    "qwen3": (None, "<|endoftext|>", False),
}


def write_stand_ins(stand_ins: Iterable[StandIn], folder: Path) -> None:
    """Write the stand-ins that are not there yet, each whole or not at all."""
    import datasets
    import transformers

    datasets.disable_progress_bars()  # of files that are written at once
    transformers.utils.logging.disable_progress_bar()
    for one in stand_ins:
        path = folder / one.path
        if path.exists():
            continue
        logger.debug("%s stands in for %s", path, one.instead_of)
        staged = path.with_name(path.name + ".partial")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        seed = zlib.crc32(one.path.encode())
        if path.suffix:  # one file
            MAKERS[one.kind](one.recipe, staged / path.name, seed)
            (staged / path.name).replace(path)
            staged.rmdir()
        else:
            MAKERS[one.kind](one.recipe, staged, seed)
            replace_folder(staged, path)


# Models.


def _model(recipe: Mapping[str, Any], folder: Path, seed: int) -> None:
    """A random model of a family, with a tokenizer of the family's kind."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if recipe["model_type"] == "clip":
        _clip(recipe, folder, seed)
        return
    # A family without a line above is stood in for by a Llama, which has every hook point of a block.
    model_type = recipe["model_type"] if recipe["model_type"] in TOKENIZERS else "llama"
    blocks, tokenizer = recipe["blocks"], _tokenizer(*TOKENIZERS[model_type])
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": blocks, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": WIDTH // 2, "max_position_embeddings": _POSITIONS,
    }  # fmt: skip
    if model_type == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": blocks, "n_head": 2, "n_positions": _POSITIONS}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    sizes |= {"vocab_size": len(tokenizer), "pad_token_id": None, **ids}
    if model_type == "gemma3":
        vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        vision |= {"intermediate_size": 8, "image_size": 28}
        sizes = {"text_config": sizes, "vision_config": vision, "image_token_index": VOCABULARY - 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(bos: str | None, eos: str, has_metaspace: bool) -> Any:
    """A BPE tokenizer that is trained on a part of the bundled English."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys(filter(None, (bos, eos))))
    if has_metaspace:
        special += ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        bpe.normalizer = normalizers.Replace(" ", "▁")
        bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        bpe.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        alphabet: list[str] = []
    else:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    text = "".join(_documents(0, 10**6))[:_TOKENIZER_CHARACTERS]
    bpe.train_from_iterator([text], trainer)
    given = {"bos_token": bos} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, **given)


def _clip(recipe: Mapping[str, Any], folder: Path, seed: int) -> None:
    """A random CLIP whose tokenizer has a token for every word of the prompts."""
    import torch
    from transformers import CLIPModel

    # Words of letters alone: CLIP splits all else off, so that it cannot become one token with a word.
    words = {word for text in recipe["texts"] for word in re.findall(r"[^\W\d_]+", text.lower())}
    tokenizer = make_tokenizer([*sorted(words), *scenes.CLASSES])
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    options = {"width": WIDTH, "layers": recipe["blocks"], "patch_size": PATCH_SIZE}
    config = clip_config(options, **ids, vocab_size=len(tokenizer))
    config.text_config.max_position_embeddings = _TEXT_POSITIONS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = CLIPModel._from_config(config)
    save_clip(model, tokenizer, folder)


def _imported(recipe: Mapping[str, Any], folder: Path, seed: int) -> None:
    """A random TopK SAE in another library's files."""
    import torch

    from saeflow.exchange import FORMATS, plain_of
    from saeflow.exchange.hook_names import theirs
    from saeflow.saes import build

    options = {"k": 8, "k_schedule": {"kind": "constant"}, "auxk_weight": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = build("topk", WIDTH, D_SAE, options)
    FORMATS[recipe["library"]].write(plain_of(sae), folder, theirs(recipe["hook_point"]))


# Data.


def _documents(seed: int, count: int) -> list[str]:
    """Topics of Python's language reference and docstrings, from a place that the seed decides on."""
    known = english.documents()
    start = seed % len(known)
    return [text[:_CHARACTERS] for text in islice((*known[start:], *known[:start]), count)]


def _texts(recipe: Mapping[str, Any], folder: Path, seed: int) -> None:
    """A data set of text in Parquet."""
    table = {recipe["column"]: _documents(seed, _DOCUMENTS)}
    _dataset(table, recipe, folder)


def _document_file(recipe: Mapping[str, Any], path: Path, seed: int) -> None:
    """One file of documents, of the kind that its name says."""
    texts, column = _documents(seed, _DOCUMENTS), recipe["column"]
    match path.suffix:
        case ".txt":
            path.write_text("\n\n".join(texts), encoding="utf-8")
        case ".jsonl":
            lines = (json.dumps({column: text}) + "\n" for text in texts)
            path.write_text("".join(lines), encoding="utf-8")
        case _:
            import pyarrow
            import pyarrow.parquet as parquet

            parquet.write_table(pyarrow.table({column: texts}), path)


def _dataset(
    table: Mapping[str, Any], recipe: Mapping[str, Any], folder: Path, features: Any = None
) -> None:
    """Write a data set of one split, and of the configuration that is asked for."""
    from datasets import Dataset

    Dataset.from_dict(dict(table), features=features).to_parquet(str(folder / "rows.parquet"))
    configuration = {
        "config_name": recipe["name"] or "default",
        "data_files": [{"split": recipe["split"], "path": "rows.parquet"}],
    }
    head = json.dumps({"configs": [configuration]})  # JSON is YAML
    (folder / "README.md").write_text(f"---\n{head}\n---\n", encoding="utf-8")


def _pictures(count: int, seed: int) -> list[bytes]:
    """Generated scenes of one to four objects, as PNG."""
    import io

    from PIL import Image

    params = {"seed": seed, "smallest": 1, "largest": 4}
    found = []
    for number in range(count):
        pixels, _ = scenes.render(scenes.draw_scene(params, number))
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        found.append(buffer.getvalue())
    return found


def _images(recipe: Mapping[str, Any], folder: Path, seed: int) -> None:
    """A data set of images in Parquet, with named classes where a column of labels is asked for."""
    from datasets import ClassLabel, Features, Image

    count, classes = recipe["count"], recipe["classes"] or default_classes()
    columns: dict[str, list[Any]] = {
        recipe["image_column"]: [{"bytes": one, "path": None} for one in _pictures(count, seed)]
    }
    features = Features({recipe["image_column"]: Image()})
    if recipe["label_column"] is not None:
        columns[recipe["label_column"]] = [number % len(classes) for number in range(count)]
        features[recipe["label_column"]] = ClassLabel(names=classes)
    _dataset(columns, recipe, folder, features)


def _image_folder(recipe: Mapping[str, Any], folder: Path, seed: int) -> None:
    """Images in one subfolder a class."""
    classes = recipe["classes"] or default_classes()
    for number, picture in enumerate(_pictures(recipe["count"], seed)):
        place = folder / classes[number % len(classes)].replace("/", "-")
        place.mkdir(exist_ok=True)
        (place / f"{number:05}.png").write_bytes(picture)


def _table(recipe: Mapping[str, Any], path: Path, seed: int) -> None:
    """A table of random scores, one for each context of both splits."""
    random = np.random.default_rng(seed)
    low, high = recipe["range"]
    lines = [
        (split, context, round(float(random.uniform(low, high)), 3))
        for split, count in recipe["contexts"].items()
        for context in range(count)
    ]
    if path.suffix == ".parquet":
        import pandas as pd

        pd.DataFrame(lines, columns=["split", "context", recipe["column"]]).to_parquet(path)
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("split", "context", recipe["column"]), *lines])


MAKERS: dict[str, Callable[[Mapping[str, Any], Path, int], None]] = {
    "models": _model,
    "imports": _imported,
    "texts": _texts,
    "documents": _document_file,
    "images": _images,
    "folders": _image_folder,
    "tables": _table,
}
"""By kind of stand-in: writes it, from its recipe, a folder or a file and a seed."""
