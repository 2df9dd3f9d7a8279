"""Inputs from outside that are changed at random: documents, images, SAEs of other libraries, tokenizers, configs.

Each change must give the right result or one line that names the file (and the row), within 2 GB. What is right is
known from how the input was made, or from an independent reader. `try_inputs` is deterministic in its seed.
"""

import functools
import gzip
import io
import json
import logging
import os
import random
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from saeflow.errors import UserError

MOST_BYTES = 2 << 30
"""Memory that reading one input may take."""
REFUSED = object()
"""What `read` gives where the input was refused in one line."""

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2**63, 10**40, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", " ", "x", "\x00",
    "null", "../../etc/passwd", "ö🙂", "\ud800", "a\nb", "x" * 5000, [], {}, [[]], [{}], [None], {"a": {"b": [1]}},
    [1, 2, 3], {"role": "user", "content": "hi"}, "topk", "relu", "float16", 7, 4, "none",
]  # fmt: skip
SPECIAL_TEXT = ["", " ", "\n", "ordinary text", "ö🙂 ẞ", "tab\there", "a\u2028b\u2029c\x85d", "x" * 3000, "\ufeffstart", "\ufffd"]  # fmt: skip


class WrongError(AssertionError):
    """An input that gave a traceback, a wrong result, or a message that names no file."""


@dataclass(frozen=True)
class Kind:
    """A kind of input: makes one, reads it, and raises WrongError where that is not as it should be."""

    share: int
    """How many of a hundred inputs."""
    check: Callable[[random.Random, Path], None]


def try_inputs(count: int, seed: int, on_wrong: Callable[[str, int, str], None]) -> dict[str, int]:
    """Try `count` inputs; returns how many of each kind.

    Args:
        count: inputs in all.
        seed: of the whole campaign.
        on_wrong: told kind, number and what is wrong; `try_one` repeats it.
    """
    tried = {}
    for name, kind in KINDS.items():
        tried[name] = max(1, round(count * kind.share / sum(k.share for k in KINDS.values())))
        for number in range(tried[name]):
            try:
                try_one(name, seed, number)
            except WrongError as error:
                on_wrong(name, number, str(error))
    return tried


def try_one(name: str, seed: int, number: int) -> None:
    """One input of a kind.

    Raises:
        WrongError: what is wrong with how it was read.
    """
    folder = Path(tempfile.mkdtemp(prefix="saeflow-input-"))
    try:
        KINDS[name].check(random.Random(f"{seed} {name} {number}"), folder)
    finally:
        shutil.rmtree(folder)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Let the address space grow by MOST_BYTES at most."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def read(work: Callable[[], Any], named: Path, row: str | None = None) -> Any:
    """The result of `work`, or REFUSED where it was refused in one line that names the file (and the row)."""
    try:
        with bounded_memory():
            return work()
    except UserError as error:
        said = str(error)
        if str(named) not in said and named.name not in said:
            raise WrongError(f"the message names no {named.name}: {said[:300]}") from None
        if row is not None and not re.search(row, said):
            raise WrongError(f"the message names no {row}: {said[:300]}") from None
        if len(said) > 2000:
            raise WrongError(f"a message of {len(said)} characters: {said[:200]}") from None
        return REFUSED
    except BaseException as error:
        raise WrongError(f"{type(error).__name__}: {str(error)[:300]}") from error


def demand(is_right: bool, what: str) -> None:
    if not is_right:
        raise WrongError(what)


# Changes.


def rotten(rng: random.Random, whole: bytes, *, first: int | None = None) -> bytes:
    """Bytes flipped, cut off, doubled, replaced or put in; near the start where `first` bounds it."""
    data = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        place = rng.randrange(min(len(data), first or len(data)))
        match rng.randrange(6):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                del data[place:]
            case 2:
                data[place:place] = data[place : place + rng.randint(1, 50)]
            case 3:
                data[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0"])  # fmt: skip
            case 4:
                data[place:place] = rng.randbytes(rng.randint(1, 9))
            case _:
                data[place : place + 1] = rng.choice(
                    [b"{", b"}", b'"', b",", b"9", b"-", b"\n", b"e"]
                )
    return bytes(data)


def places(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children: Any = ()
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list):
        children = list(enumerate(node))[:40]
    return [at, *(path for key, child in children for path in places(child, (*at, key)))]


def other_json(rng: random.Random, value: Any, changes: int | None = None) -> Any:
    """A JSON value with some places replaced, deleted or added."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3) if changes is None else changes):
        everywhere = places(value)[1:]
        if not everywhere:
            break
        *parents, last = rng.choice(everywhere)
        node = value
        for key in parents:
            node = node[key]
        match rng.randrange(4):
            case 0:
                del node[last]
            case 1 if isinstance(node, dict):
                node[rng.choice(["x", "", *node])] = rng.choice(NASTY)
            case _:
                node[last] = rng.choice(NASTY)
    return value


def write_json_or_rot(rng: random.Random, path: Path, value: Any) -> Any:
    """Write a changed JSON value; sometimes damaged bytes, and then None comes back."""
    if rng.random() < 0.25:
        path.write_bytes(rotten(rng, json.dumps(value, indent=1).encode()))
        return None
    changed = other_json(rng, value)
    path.write_text(json.dumps(changed), encoding="utf-8")
    return changed


# Documents.


@contextmanager
def said() -> Iterator[list[str]]:
    """What saeflow logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("saeflow")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def documents_of(path: Path, **options: Any) -> list[str]:
    from saeflow.sources.documents import read_documents

    return list(read_documents({"files": [str(path)], "column": "text", **options}))


def is_whole(text: str) -> bool:
    """Whether a text has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def jsonl(rng: random.Random, folder: Path) -> None:
    """JSONL in some encoding and compression, some cells no text, some lines damaged."""
    cells: list[Any] = [rng.choice(SPECIAL_TEXT) + str(i) for i in range(rng.randint(1, 12))]
    if rng.random() < 0.6:
        cells[rng.randrange(len(cells))] = rng.choice(NASTY)
    rows = [{"id": i, "text": cell} for i, cell in enumerate(cells)]
    if rng.random() < 0.1:
        rows[rng.randrange(len(rows))] = other_json(rng, {"text": "a", "id": 1}, 1)
    is_ascii = rng.random() < 0.5
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines = [
        line if is_whole(line) and not is_ascii else json.dumps(row)
        for line, row in zip(lines, rows, strict=True)
    ]
    if rng.random() < 0.05:
        lines[rng.randrange(len(lines))] = rng.choice(["[" * 50_000, '{"text": ' + "[" * 50_000, "", "x", "1", '"text"', "{}"])  # fmt: skip
    end = rng.choice(["\n", "\n", "\r\n"])
    text = end.join(lines) + rng.choice(["", end])
    try:
        data = text.encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]))
    except UnicodeEncodeError:
        data = text.encode()
    damaged = rng.random() < 0.3
    if damaged:
        data = rotten(rng, data)
    suffix = rng.choice(["", "", ".gz"])
    if suffix:
        data = gzip.compress(data, mtime=0)
        if rng.random() < 0.3:
            data = rotten(rng, data)
            damaged = True
    path = folder / f"a.jsonl{suffix}"
    path.write_bytes(data)
    with said() as log:
        found = read(lambda: documents_of(path), path)
    expected = _jsonl_by_json(data if not suffix else _unzipped(data))
    if expected is None or found is REFUSED:
        demand(
            damaged or found is REFUSED or expected is not None,
            f"read {str(found)[:100]} where a line or cell is no text",
        )
        if found is REFUSED and expected is not None and not damaged:
            raise WrongError("refused text that is whole")
        return
    texts = [cell for cell in expected if cell is not None and is_whole(cell)]
    demand(found == texts, f"expected {str(texts)[:200]}, found {str(found)[:200]}")
    if len(texts) < len(expected):
        demand(any("left out" in line for line in log), "cells are left out and the log is silent")


def _unzipped(data: bytes) -> bytes | None:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, ValueError):
        return None
    except Exception as error:  # zlib.error
        if type(error).__name__ != "error":
            raise
        return None


def _jsonl_by_json(data: bytes | None) -> list[str | None] | None:
    """Cells by Python's own codecs and JSON, None where any line has no cell of text or null."""
    if data is None:
        return None
    text = None
    marks = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    for codec in [next((c for mark, c in marks.items() if data.startswith(mark)), "utf-8")]:
        try:
            text = data.decode(codec)
        except UnicodeDecodeError:
            return None
    cells: list[str | None] = []
    for line in re.split(r"\r\n|\r|\n", text or ""):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(row, dict) or "text" not in row:
            return None
        if row["text"] is not None and not isinstance(row["text"], str):
            return None
        cells.append(row["text"])
    return cells


def plain_text(rng: random.Random, folder: Path) -> None:
    """A .txt in some encoding: no character is lost or made up."""
    text = "\n\n".join(rng.choice(SPECIAL_TEXT[3:8]) for _ in range(rng.randint(1, 9)))
    codec = rng.choice(["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"])
    try:
        data = text.encode(codec)
    except UnicodeEncodeError:
        codec, data = "utf-8", text.encode()
    damaged = rng.random() < 0.4
    data = rotten(rng, data) if damaged else data
    path = folder / "a.txt"
    path.write_bytes(data)
    found = read(lambda: documents_of(path), path)
    if found is REFUSED:
        is_utf8 = codec.startswith("utf") or text.isascii()
        demand(damaged or not is_utf8, f"refused text in {codec}")
        return
    if not damaged:
        expected, there = ("".join("".join(t).split()) for t in (text, found))
        demand(there == expected, f"{codec}: expected {expected[:80]!r}, found {there[:80]!r}")


def parquet(rng: random.Random, folder: Path) -> None:
    """Parquet columns of every type, with nulls, whole or damaged (pages bear checksums)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = [rng.choice(SPECIAL_TEXT[:-2]) + str(i) for i in range(rng.randint(1, 20))]
    texts: list[str | None] = [None if rng.random() < 0.1 else word for word in words]
    columns: dict[str, Callable[[], Any]] = {
        "string": lambda: pa.array(texts, pa.string()),
        "large_string": lambda: pa.array(texts, pa.large_string()),
        "dictionary": lambda: pa.array(texts, pa.string()).dictionary_encode(),
        "string_view": lambda: pa.array(texts, pa.string_view()),
        "null": lambda: pa.nulls(len(texts)),
        "int": lambda: pa.array(range(len(texts))),
        "float": lambda: pa.array([float(i) for i in range(len(texts))]),
        "bool": lambda: pa.array([i % 2 == 0 for i in range(len(texts))]),
        "binary": lambda: pa.array([b"bytes"] * len(texts), pa.binary()),
        "token ids": lambda: pa.array([[1, 2, 3]] * len(texts)),
        "strings": lambda: pa.array([["a", "b"]] * len(texts)),
        "messages": lambda: pa.array([[{"role": "user", "content": "hi"}]] * len(texts)),
        "timestamp": lambda: pa.array([0] * len(texts), pa.timestamp("s")),
    }
    kind = rng.choice([*columns, "string", "string", "string"])
    table = pa.table({"text": columns[kind](), "other": pa.array(words)})
    path = folder / "a.parquet"
    codec = rng.choice(["snappy", "zstd", "none"])
    pq.write_table(
        table, path, compression=codec, write_page_checksum=True, row_group_size=rng.choice([3, 100]),
        use_dictionary=rng.random() < 0.5,
    )  # fmt: skip
    damaged = rng.random() < 0.5
    if damaged:
        path.write_bytes(rotten(rng, path.read_bytes()))
    found = read(lambda: documents_of(path), path)
    is_text = kind in ("string", "large_string", "dictionary", "string_view", "null")
    if found is REFUSED:
        demand(damaged or not is_text, f"refused a column of type {kind}")
        return
    demand(damaged or is_text, f"read a column of type {kind} as text: {found[:2]}")
    expected = [] if kind == "null" else [text for text in texts if text is not None]
    if not damaged or len(found) == len(expected):
        demand(damaged or found == expected, f"expected {expected[:3]}, found {found[:3]}")


# SAEs of other libraries.

D_IN, D_SAE = 6, 16
SAELENS: dict[str, Any] = {
    "architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu",
    "activation_fn_str": "relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": True,
    "normalize_activations": "none", "finetuning_scaling_factor": False, "hook_name": "blocks.1.hook_resid_post",
    "hook_layer": 1, "hook_head_index": None, "prepend_bos": True, "context_size": 16, "model_name": "gpt2",
}  # fmt: skip


def _weights(names: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


AFFINE = _weights({"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)})  # fmt: skip
ROWS = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(1)) * 2


def saelens(rng: random.Random, folder: Path) -> None:
    """A config with other values, or weights with other headers: what is read does what SAELens would do."""
    from saeflow.exchange import saelens as library
    from saeflow.exchange.plain import sae_of

    base = SAELENS | rng.choice(
        [{}, {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}, {"architecture": "topk", "k": 3, "activation_fn_str": "topk"}]
    )  # fmt: skip
    save_file(AFFINE, folder / library.WEIGHTS)
    config: dict[str, Any] | None = base
    if rng.random() < 0.3:
        weights = folder / library.WEIGHTS
        weights.write_bytes(rotten(rng, weights.read_bytes(), first=320))
        (folder / library.CONFIG).write_text(json.dumps(base))
        config = None
    else:
        config = write_json_or_rot(rng, folder / library.CONFIG, base)
    plain = read(lambda: library.read(folder), folder)
    if plain is REFUSED or config is None:
        return
    expected = _saelens_latents(config)
    demand(expected is not None, f"read a config that SAELens does not take so: {config}")
    with torch.no_grad():
        found = sae_of(plain)[2].encode(ROWS)
    demand(torch.allclose(found, expected, atol=1e-4), f"other latents than SAELens's: {config}")


def _saelens_latents(config: Any) -> torch.Tensor | None:
    """Latents as sae_lens 5 makes them (sae.py), None for what it refuses or does beyond an affine encoder."""
    config = {{"activation_fn": "activation_fn_str"}.get(k, k): v for k, v in config.items()}
    config = {
        "architecture": "standard",
        "activation_fn_kwargs": {},
        "apply_b_dec_to_input": True,
    } | config
    if config["architecture"] not in ("standard", "topk"):
        return None
    dtype = {
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "float64": torch.float64,
    }
    if str(config.get("dtype", "float32")).removeprefix("torch.") not in dtype:
        return None
    w = {
        name: part.to(dtype[str(config.get("dtype", "float32")).removeprefix("torch.")]).float()
        for name, part in AFFINE.items()
    }
    pre = (ROWS - w["b_dec"] * config["apply_b_dec_to_input"]) @ w["W_enc"] + w["b_enc"]
    default = "topk" if config["architecture"] == "topk" else "relu"
    activation = config.get("activation_fn_str") or default
    if activation == "relu" and config["architecture"] == "standard":
        return pre.relu()
    if activation != "topk":
        return None
    kwargs = config["activation_fn_kwargs"] or {}
    k = kwargs.get("k", config.get("k")) if isinstance(kwargs, dict) else None
    if type(k) is not int or not 1 <= k <= D_SAE:
        return None
    best = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())


def dictionary_learning(rng: random.Random, folder: Path) -> None:
    """The same of dictionary_learning's folders; its weights are a pickle that is never run."""
    from saeflow.exchange import dictionary_learning as library
    from saeflow.exchange.plain import Plain, sae_of

    kind = rng.choice(["relu", "topk", "jumprelu", "gated"])
    extra: dict[str, Any] = {
        "relu": {}, "topk": {"k": 4}, "jumprelu": {"threshold": torch.full((D_SAE,), 0.3)},
        "gated": {"r_mag": torch.zeros(D_SAE), "b_mag": torch.zeros(D_SAE)},
    }[kind]  # fmt: skip
    plain = Plain(kind, **AFFINE, **extra)  # type: ignore[arg-type]
    library.write(plain, folder, {"lm_name": "gpt2"})
    config, weights = folder / library.CONFIG, folder / library.WEIGHTS
    changed: Any = True
    if rng.random() < 0.5:
        weights.write_bytes(rotten(rng, weights.read_bytes(), first=rng.choice([400, None])))
    else:
        changed = write_json_or_rot(rng, config, json.loads(config.read_text()))
    found = read(lambda: library.read(folder), folder)
    if found is REFUSED or not isinstance(changed, dict):
        return
    with torch.no_grad():  # the config alone was changed, and of it only dict_class decides
        ours, whole = (sae_of(one)[2](ROWS) for one in (found, plain))
    same = changed["trainer"].get("dict_class") == {"relu": "AutoEncoder", "topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder", "gated": "GatedAutoEncoder"}[kind]  # fmt: skip
    demand(not same or torch.allclose(ours, whole, atol=1e-4), f"another function: {changed}")


# Images.


@functools.cache
def clip() -> Path:
    """A tiny random CLIP with its preprocessor."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    folder = Path(_templates.name, "clip")
    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = small | {
        "vocab_size": 60,
        "max_position_embeddings": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    vision = small | {"image_size": 32, "patch_size": 8}
    made = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    made.save_pretrained(folder)
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**sides).save_pretrained(folder)
    return folder


_templates = tempfile.TemporaryDirectory(prefix="saeflow-templates-")


@functools.cache
def clip_preprocessing() -> Any:
    from saeflow.sources.preprocessing import load_preprocessing

    return load_preprocessing(clip())


def picture(rng: random.Random) -> tuple[bytes, str]:
    """An image file of some format, mode, size and EXIF, as Pillow writes it."""
    from PIL import Image

    kind = rng.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "MPO"])
    modes = {
        "PNG": ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"], "JPEG": ["RGB", "L", "CMYK"], "GIF": ["P", "L"],
        "BMP": ["RGB", "L", "P", "1"], "TIFF": ["RGB", "RGBA", "L", "CMYK", "I;16", "F"], "WEBP": ["RGB", "RGBA"],
        "PPM": ["RGB", "L"], "MPO": ["RGB"],
    }  # fmt: skip
    mode = rng.choice(modes[kind])
    size = rng.choice([(40, 36), (1, 1), (7, 90), (1, 3000), (64, 64)])
    noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 255, (*size[::-1], 3), np.uint8)
    image = Image.fromarray(noise)
    image = image.convert("L").convert(mode) if mode in ("I;16", "F") else image.convert(mode)
    options: dict[str, Any] = {}
    if kind in ("JPEG", "PNG", "TIFF", "WEBP", "MPO") and rng.random() < 0.5:
        exif = Image.Exif()
        exif[0x0112] = rng.choice([1, 3, 6, 8, 0, 99])
        exif[0x010F] = "maker"
        options["exif"] = exif.tobytes()
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue(), f"{kind} {mode} {size} {'exif' if options else ''}"


def image(rng: random.Random, folder: Path) -> None:
    """An image file whose header, EXIF or body is damaged is decoded or counted; a whole one is decoded."""
    from saeflow.sources.decoding import Ready, prepare_image
    from saeflow.sources.images import NO_LABEL, Item

    preprocessing = clip_preprocessing()
    data, what = picture(rng)
    damaged = rng.random() < 0.85
    if damaged and "exif" in what and rng.random() < 0.5:
        place = max(data.find(b"Exif"), data.find(b"II*"), data.find(b"MM\0*"), 0)
        data = data[:place] + rotten(rng, data[place : place + 60]) + data[place + 60 :]
    elif damaged:
        data = rotten(rng, data, first=rng.choice([30, 100, 700, None]))
    (folder / "image").write_bytes(data)
    found = read(lambda: prepare_image(Item("image", NO_LABEL, data), preprocessing), Path("image"))
    if isinstance(found, Ready):
        shape = (preprocessing.height, preprocessing.width, 3)
        demand(found.pixels.shape == shape, f"{what}: pixels of {found.pixels.shape}")
        demand(found.pixels.dtype == np.uint8, f"{what}: {found.pixels.dtype}")
        return
    demand(isinstance(found, str) and bool(found.strip()), f"{what}: no reason, {found!r}")
    demand(damaged, f"{what}: whole, and not read ({found})")
    demand("\n" not in found, f"{what}: a reason of several lines, {found[:100]!r}")


def image_folder(rng: random.Random, folder: Path) -> None:
    """Folders with classes, hidden files, unknown suffixes and odd names: all is read or counted in the log."""
    from saeflow.sources.images import NO_LABEL, read_images

    data, _ = picture(rng)
    root = os.fsencode(folder / "images")
    os.mkdir(root)
    classes = rng.sample(["10", "9", "0", "b", "a", "ö", ".hidden", "x y"], rng.randint(0, 4))
    names = [b"a.png", b"B.JPG", b".dot.png", b"notes.txt", b"no-suffix", b"\xff\xfe.png", "ö.webp".encode(), b"c.jfif", b"d.heic"]  # fmt: skip
    written = []
    for place in [b"", *(name.encode() for name in classes)]:
        os.makedirs(os.path.join(root, place), exist_ok=True)
        for name in rng.sample(names, rng.randint(0, 4)):
            with open(os.path.join(root, place, name), "wb") as file:
                file.write(data)
            written.append((place, name))
    with said() as log:
        found = read(lambda: list(read_images({"folder": str(folder / "images")})[1]), folder)
    hidden = [w for w in written if w[0].startswith(b".") or w[1].startswith(b".")]
    known = [w for w in written if w not in hidden and w[1].lower().endswith((b".png", b".jpg", b".webp", b".jfif"))]  # fmt: skip
    if found is REFUSED:
        demand(not known, f"refused {known}")
        return
    counted = sum(int(n) for line in log for n in re.findall(r"(\d+) files are left out", line))
    demand(len(found) + counted == len(written), f"{len(found)} read, {counted} counted, of {written}")  # fmt: skip
    demand(len(found) >= len(known), f"{len(found)} read of {known}")
    labels = {item.id.split("/")[0]: item.label for item in found if "/" in item.id}
    order = sorted(labels, key=lambda name: labels[name])
    whole = all(name.isdecimal() for name in labels) and all(name.isdecimal() for name in classes if name[0] != ".")  # fmt: skip
    demand(order == sorted(labels, key=int if whole else None), f"classes in the order {order}")
    demand(all(item.label == NO_LABEL for item in found if "/" not in item.id), "a class of no folder")  # fmt: skip


# Models: tokenizers, preprocessors, configs, headers of weights.


@functools.cache
def language_model() -> Path:
    """A tiny random GPT-2 with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = Path(_templates.name, "lm")
    torch.manual_seed(0)
    config = GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=32, vocab_size=300, bos_token_id=0, eos_token_id=1)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def copied(template: Path, folder: Path, *, weights: bool = False) -> Path:
    """A copy of a model's folder."""
    place = folder / "model"
    place.mkdir()
    for path in template.iterdir():
        if weights or path.suffix != ".safetensors":
            shutil.copy(path, place / path.name)
    return place


def tokenizer(rng: random.Random, folder: Path) -> None:
    """A changed tokenizer.json gives what the tokenizers library reads of it, or is refused."""
    from tokenizers import Tokenizer

    from saeflow.sources.models import load_tokenizer

    place = copied(language_model(), folder)
    name = rng.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
    write_json_or_rot(rng, place / name, json.loads((place / name).read_text()))
    text = "the quick brown fox, ö🙂"
    found = read(lambda: load_tokenizer(place).encode(text, add_special_tokens=False), place)
    if found is REFUSED or name != "tokenizer.json":
        return
    expected = Tokenizer.from_file(str(place / name)).encode(text, add_special_tokens=False).ids
    demand(found == expected, f"{found} are not the ids of the tokenizer, {expected}")


def processor(rng: random.Random, folder: Path) -> None:
    """A changed preprocessor_config.json gives the pixels of CLIP's own processor, or is refused."""
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    from saeflow.sources.preprocessing import fit, load_preprocessing, normalised

    place = copied(clip(), folder)
    path = place / "preprocessor_config.json"
    write_json_or_rot(rng, path, json.loads(path.read_text()))
    noise = np.random.default_rng(0).integers(0, 255, (45, 61, 3), np.uint8)

    def ours() -> np.ndarray:
        preprocessing = load_preprocessing(place)
        return normalised(fit(Image.fromarray(noise), preprocessing)[None], preprocessing).numpy()

    found = read(ours, place)
    if found is REFUSED:
        return
    try:
        own = CLIPImageProcessorPil.from_pretrained(place)
        theirs = own(Image.fromarray(noise), return_tensors="np")
    except Exception as error:
        raise WrongError(
            f"CLIP's own processor refuses it ({error}): {path.read_text()[:600]}"
        ) from error
    expected = np.asarray(theirs["pixel_values"])
    demand(found.shape == expected.shape, f"pixels of {found.shape}, CLIP's own are {expected.shape}")  # fmt: skip
    demand(np.allclose(found, expected, atol=1e-4), f"off by {np.abs(found - expected).max()}: {path.read_text()[:600]}")  # fmt: skip


def model_files(rng: random.Random, folder: Path) -> None:
    """A model with a changed config.json or a damaged header of weights is loaded whole or refused."""
    from saeflow.sources.models import fetch_model, load_model

    place = copied(language_model(), folder, weights=True)
    if rng.random() < 0.5:
        path = place / "config.json"
        write_json_or_rot(rng, path, json.loads(path.read_text()))
    else:
        path = place / "model.safetensors"
        path.write_bytes(rotten(rng, path.read_bytes(), first=2000))
    fetched = folder / "fetched"
    fetched.mkdir()

    def work() -> Any:
        fetch_model({"folder": str(place)}, ["blocks.1.resid_post"], fetched)
        return load_model(fetched, "cpu")

    found = read(work, folder)
    if found is not REFUSED:
        demand(len(found.transformer.h) >= 2, "a model without the block that is asked for")


KINDS: dict[str, Kind] = {
    "jsonl": Kind(22, jsonl),
    "txt": Kind(7, plain_text),
    "parquet": Kind(15, parquet),
    "image": Kind(20, image),
    "image folder": Kind(5, image_folder),
    "SAELens SAE": Kind(11, saelens),
    "dictionary_learning SAE": Kind(7, dictionary_learning),
    "tokenizer": Kind(6, tokenizer),
    "image processor": Kind(5, processor),
    "model": Kind(2, model_files),
}
