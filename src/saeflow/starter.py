"""A first parameter file for the user's own model and data, with sizes that fit the data and this machine."""

import logging
import math
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from saeflow.config import ROOT, validate
from saeflow.device import has_gpu
from saeflow.errors import UserError
from saeflow.files import atomic_file, files_below
from saeflow.needs import Needs, Rates, count_passes
from saeflow.plan import Plan
from saeflow.shapes import config_shape
from saeflow.sources import hub
from saeflow.sources.documents import check_files, is_evaluation, read_documents
from saeflow.sources.images import read_images
from saeflow.sources.layouts import EMBEDDING, check_shape
from saeflow.sources.models import FILES, config_in, load_tokenizer
from saeflow.sources.text_files import COMPRESSED, check_encoding
from saeflow.sources.tokenizers import found_token

logger = logging.getLogger(__name__)

PARAMS = "params.yaml"
_SHARES = (0.1, 0.2, 0.3, 0.5)
"""Shares of documents or images that may be held out: the first that gives enough contexts to evaluate on."""
_CONTEXT_LENGTH = 128
_MOST_ROWS = {False: 1_000_000, True: 10_000_000}
"""Rows to train on at most, without a GPU and with one."""
_LEAST_ROWS = 256
_LEAST_CONTEXTS = 4
_HOURS = 1.0
"""Hours that the first run may take by `saeflow plan`, and the share of the free disk that it may fill."""
_DISK_SHARE = 0.2
_COUNT_S = 60.0
"""Seconds of reading after which no more of the data is counted."""
_PASSES = 4
"""Times that training sees each row."""
_STEPS = 500
"""Steps that training has at least, where the batch can be made small enough."""
_KS = (16, 32, 64)
_CE_CONTEXTS = 32
_TOKENIZER = tuple(pattern for pattern in FILES if pattern != "*.safetensors")
_AT_ONCE = 64
"""Documents that are tokenised at once."""


@dataclass(frozen=True)
class Asked:
    """The model and the data that a first file is for: one of text, images and dataset."""

    model: str
    """A folder that `save_pretrained` wrote, or the hub's OWNER/NAME: @COMMIT after it, or its newest commit."""
    text: tuple[Path, ...] = ()
    images: Path | None = None
    dataset: str = ""
    column: str = ""
    hook_point: str = ""
    encoding: str = ""
    """The encoding of files of text; where empty UTF-8, or what a byte order mark says."""


@dataclass(frozen=True)
class _Model:
    """Facts of a model, known without its weights."""

    entry: Mapping[str, Any]
    folder: Path
    """Its config.json and tokenizer."""
    name: str
    is_image: bool
    n_blocks: int
    width: int
    length: int
    """Tokens of a context, or rows of an image."""
    tokens: str
    """`tokens` of a source of images."""
    predicts: bool
    """It is made to predict next tokens."""


def write_first(asked: Asked, folder: Path) -> str:
    """Write FOLDER/params.yaml, which `saeflow run` takes.

    Returns:
        What was written, in one line.

    Raises:
        UserError: the file is there already, or the model or the data cannot be used.
    """
    path = folder / PARAMS
    if path.exists():
        raise UserError(f"{path}: it is there already. Edit it, or give another folder.")
    model = _model(asked)
    of_images = f"vision.blocks.{max(0, model.n_blocks - 2)}.resid_post"
    of_text = f"blocks.{2 * model.n_blocks // 3}.resid_post"
    hook_point = asked.hook_point or (of_images if model.is_image else of_text)
    check_shape(config_shape(model.folder / "config.json"), [hook_point], asked.model)
    source = _source(asked, model, hook_point)
    most, whole = _fitting(source, model, folder)
    contexts = _contexts(source, whole, model, most)
    text = _written(source, model, contexts, most)
    plan = Plan(validate(yaml.safe_load(text)))
    with atomic_file(path) as staged:
        staged.write_text(text, encoding="utf-8")
    return (
        f"{path}: {len(plan.runs)} SAEs at {hook_point} of {asked.model}, "
        f"about {max(1, round(60 * _hours(plan)))} min by `saeflow plan`."
    )


# The model.


def _model(asked: Asked) -> _Model:
    """Facts of the model, from its folder or the hub."""
    local, named = Path(asked.model), asked.model
    if local.is_dir():
        entry: dict[str, Any] = {"folder": str(local.resolve())}
        folder = local
    elif local.exists() or named.startswith((".", "/", "~")) or named.count("/") != 1:
        raise UserError(
            f"--model: expected a folder that save_pretrained wrote, or OWNER/NAME of the hub, found {named}. Fix it."
        )
    else:
        name, _, revision = named.partition("@")
        revision = revision or hub.newest_commit(name, "model")
        entry = {"hub": name, "revision": revision}
        folder = hub.config_file(name, revision).parent
    from saeflow.sources.architectures import depth_of, image_part, predicts_tokens

    shape = config_shape(folder / "config.json")
    config = config_in(folder)
    part = image_part(config)
    is_image = shape.is_of_images or (asked.images is not None and part is not config)
    _check_kind(asked, is_image)
    tokens = ""
    if is_image:
        if "hub" in entry:
            hub.snapshot(entry["hub"], entry["revision"], list(_TOKENIZER))
        width, tokens, length, more = _of_tower(folder, asked.hook_point)
        entry |= more
    else:
        part = config.get_text_config()
        width = int(part.hidden_size)
        length = min(_CONTEXT_LENGTH, getattr(part, "max_position_embeddings", _CONTEXT_LENGTH))
    name = re.sub("[^a-z0-9]+", "-", named.partition("@")[0].rstrip("/").rpartition("/")[2].lower())
    n_blocks = shape.n_blocks if is_image == shape.is_of_images else None
    return _Model(
        entry, folder, name.strip("-")[:60] or "model", is_image, n_blocks or depth_of(part) or 1,
        width, length, tokens, not is_image and predicts_tokens(config),
    )  # fmt: skip


def _of_tower(folder: Path, hook_point: str) -> tuple[int, str, int, dict[str, int]]:
    """Width of an image tower, `tokens` that fit it (patches where no CLS token, or registers, stand before them), rows of an
    image, and the size of images where it takes any."""
    from saeflow.sources.preprocessing import load_preprocessing
    from saeflow.sources.vision import rows_per_context

    found = load_preprocessing(folder, choose=True)
    tokens = "cls" if hook_point == EMBEDDING else "all" if found.prefix == 1 else "patches"
    rows = rows_per_context({"tokens": tokens}, found)
    return found.d_model, tokens, rows, {"image_size": found.height} if found.any_size else {}


def _check_kind(asked: Asked, is_image: bool) -> None:
    given = sum([bool(asked.text), asked.images is not None, bool(asked.dataset)])
    if given != 1:
        raise UserError(
            f"init: expected one of --text, --images and --dataset, found {given or 'none'}. Give one."
        )
    if asked.encoding and not asked.text:
        raise UserError(
            "--encoding: expected --text, whose files it is of, found none. Leave it out."
        )
    kinds = ("a language model", "a model of images")
    if (asked.text and is_image) or (asked.images and not is_image):
        expected, found = kinds if asked.text else kinds[::-1]
        option = "--text" if asked.text else "--images"
        raise UserError(f"--model: expected {expected} for {option}, found {found}: {asked.model}.")


# The data.


def _source(asked: Asked, model: _Model, hook_point: str) -> dict[str, Any]:
    """The entry of `sources`, but for the share that is held out."""
    source: dict[str, Any] = {
        "kind": "vision" if model.is_image else "text",
        "model": dict(model.entry),
        "hook_points": [hook_point],
    }
    if model.is_image:
        source["images"] = (
            {"folder": str(asked.images.resolve())}
            if asked.images
            else _dataset(asked, "image_column")
        )
        source["tokens"] = model.tokens
        return source
    if asked.dataset:
        source["text"] = _dataset(asked, "column")
    else:
        source["text"] = {"files": _files(asked.text), "column": asked.column or "text"}
        if asked.encoding:
            check_encoding(asked.encoding)
            source["text"]["encoding"] = asked.encoding
        check_files(source["text"])
    source["context_length"] = model.length
    return source


def _files(paths: tuple[Path, ...]) -> list[str]:
    """Files of text: those named, and those below folders that are named."""
    found: list[str] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"--text: no such file or folder: {path}. Fix the path.")
        below = files_below(path) if path.is_dir() else [path]
        texts = [one for one in below if _is_text(one)]
        if not texts:
            raise UserError(
                f"--text: expected .txt, .jsonl (also compressed) or .parquet, found none: {path}. Give such files."
            )
        found += [str(one.resolve()) for one in texts]
    return found


def _is_text(path: Path) -> bool:
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    return suffix in (".txt", ".jsonl") or path.suffix == ".parquet"


def _dataset(asked: Asked, column: str) -> dict[str, Any]:
    name, _, revision = asked.dataset.partition("@")
    if Path(name).exists():
        raise UserError(
            f"--dataset: expected OWNER/NAME of the hub, found a file or folder: {name}. Use --text or --images."
        )
    revision = revision or hub.newest_commit(name, "dataset")
    default = "image" if column == "image_column" else "text"
    return {
        "dataset": name, "revision": revision, "split": "train", column: asked.column or default, "streaming": True
    }  # fmt: skip


def _contexts(
    source: dict[str, Any], whole: Mapping[str, Any], model: _Model, most: int
) -> dict[float, dict[str, int]]:
    """Contexts of each split that the data gives, by the share that is held out; as many as are of use.

    Of a text's evaluation contexts half count, since those that share a run of tokens with the training split are left
    out later.

    Sets `prepend_bos` of a source whose tokenizer has no such token.
    """
    rows = model.length - (not model.is_image)
    enough = {"train": most // rows + 1, "evaluation": 2 * (most // 10 // rows + 1)}
    tokens = {share: {"train": 0, "evaluation": 0} for share in _SHARES}
    began = time.monotonic()
    if model.is_image:
        counted, length = _of_images(source), 1
    else:
        if "hub" in model.entry:
            hub.snapshot(model.entry["hub"], model.entry["revision"], list(_TOKENIZER))
        tokenizer: Any = load_tokenizer(model.folder)
        if found_token(tokenizer, "eos") is None:
            raise UserError(
                f"--model: its tokenizer has no EOS token, which separates documents: {model.entry}."
            )
        if found_token(tokenizer, "bos") is None:
            source["prepend_bos"] = False
        length = model.length - source.get("prepend_bos", True)
        most_of_one = whole["contexts_per_document"] or math.inf
        counted = _of_text(source, tokenizer, most_of_one * length)
    for sizes in counted:
        for share, split, size in sizes:
            tokens[share][split] += size
        first = tokens[_SHARES[0]]
        if all(first[split] >= enough[split] * length for split in enough):
            break
        if time.monotonic() - began > _COUNT_S:
            logger.info("stopped counting the data after %.0f s; there is more", _COUNT_S)
            break
    kept = {"train": 1, "evaluation": 1 if model.is_image else 2}
    return {
        share: {
            split: min(count // length // kept[split], enough[split])
            for split, count in splits.items()
        }
        for share, splits in tokens.items()
    }


def _of_text(
    source: Mapping[str, Any], tokenizer: Any, most: float
) -> Iterator[list[tuple[float, str, int]]]:
    documents = read_documents(source["text"])
    while texts := [document.text for document in islice(documents, _AT_ONCE)]:
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        yield [
            (
                share,
                "evaluation" if is_evaluation(text, share) else "train",
                int(min(len(own) + 1, most)),
            )
            for text, own in zip(texts, ids, strict=True)
            for share in _SHARES
        ]


def _of_images(source: Mapping[str, Any]) -> Iterator[list[tuple[float, str, int]]]:
    images = {"name": None, "label_column": None, "shuffle_seed": None, **source["images"]}
    for item in read_images(images)[1]:
        place = int.from_bytes(item.digest[:8], "big") / 2**64
        yield [(share, "evaluation" if place < share else "train", 1) for share in _SHARES]


# Sizes.


def _fitting(source: Mapping[str, Any], model: _Model, folder: Path) -> tuple[int, dict[str, Any]]:
    """Rows to train on at most, for this machine's time and disk, and the source with its defaults."""
    near = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    disk = _DISK_SHARE * shutil.disk_usage(near).free
    most = min(_MOST_ROWS[has_gpu()], int(disk / 2 / 2 / model.width))
    plenty = {share: dict.fromkeys(("train", "evaluation"), most) for share in _SHARES}
    while True:
        values = validate(yaml.safe_load(_written(dict(source), model, plenty, most)))
        if most <= _LEAST_ROWS or _hours(Plan(values)) <= _HOURS:
            return most, values["sources"][model.name]
        most //= 2


def _hours(plan: Plan) -> float:
    """Hours of a run by `saeflow plan`, at the rates of a CPU or of a GPU, as this machine has."""
    rates = ROOT / "benchmarks" / "results" / ("rates-h200.yaml" if has_gpu() else "rates.yaml")
    needs = Needs(plan, Rates.read(rates), count_passes(plan, Path("results")))
    return sum(need.hours for need in needs.steps())


def _written(
    source: dict[str, Any], model: _Model, contexts: Mapping[float, Mapping[str, int]], most: int
) -> str:
    """The parameter file.

    Raises:
        UserError: the data is too little.
    """
    each = model.length - (not model.is_image)
    least = math.ceil(_LEAST_ROWS / each)
    share = next(
        (
            one
            for one, found in contexts.items()
            if found["evaluation"] >= _LEAST_CONTEXTS and found["train"] >= least
        ),
        None,
    )
    if share is None:
        what = "images" if model.is_image else f"contexts of {model.length} tokens"
        found = contexts[_SHARES[-1]]
        raise UserError(
            f"init: expected at least {least} {what} to train on and {_LEAST_CONTEXTS} to evaluate on, found "
            f"{found['train']} and {found['evaluation']} when half of the data is held out. Give more data."
        )
    train = min(contexts[share]["train"] * each, most)
    evaluation = min(contexts[share]["evaluation"] * each, max(most // 10, _LEAST_CONTEXTS * each))
    tokens = _PASSES * train
    batch = 1 << max(5, min(11, int(math.log2(max(1, tokens // _STEPS)))))
    d_sae = model.width * (8 if has_gpu() else 4)
    ks = [k for k in _KS if k <= d_sae // 4] or [max(1, d_sae // 8)]
    template = Path(__file__).with_name("starter.yaml.in").read_text(encoding="utf-8")
    return template.format(
        name=model.name,
        source="\n".join(f"    {key}: {_flow(value)}" for key, value in source.items()),
        share=share,
        train=train,
        evaluation=evaluation,
        tokens=tokens,
        passes=_PASSES,
        batch=batch,
        warmup=tokens // batch // 20,
        dead=max(1, tokens // 4),
        store=f"{model.name}/{source['hook_points'][0]}",
        d_sae=d_sae,
        d_in=model.width,
        width=d_sae // model.width,
        ks=_flow(ks),
        k=ks[len(ks) // 2],
        threshold=tokens // batch // 2,
        ce="" if model.is_image else f"\n  ce_contexts: {min(_CE_CONTEXTS, evaluation // each)}",
        figures="fvu_l0, ce_l0, controls" if model.predicts else "fvu_l0, controls",
    )


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    text: str = yaml.safe_dump(
        value, default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")
