"""Reports of model libraries on files: errors as one line, reports of weights as a check."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.files import read_json
from saeflow.sources import hub

logger = logging.getLogger(__name__)

_NO_WEIGHT = re.compile(
    r"(^|\.)(position_ids|inv_freq|(attn|attention)\.(masked_)?bias)$"  # masks and positions of older checkpoints
)


_OTHER_SHAPES = "ignore_mismatched_sizes"
"""The argument that transformers tells one to set where they differ."""


@contextmanager
def one_line(failure: str, advice: str) -> Iterator[None]:
    """Turn what model libraries raise at bad files into one line.

    Raises:
        UserError: in place of their errors.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    foreign = (
        OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, ArithmeticError,
        AssertionError, MemoryError, SafetensorError, StrictDataclassError,
    )  # fmt: skip
    found: Exception
    try:
        yield
        return
    except UserError:
        raise
    except foreign as error:
        found = error
    except Exception as error:
        if type(error) is not Exception:  # tokenizers raises bare ones
            raise
        found = error
    said = hub.last_line(str(found))
    if _OTHER_SHAPES in said:  # its report of them went to the log
        said = "its weights have other shapes than its config.json says"
    raise UserError(f"{failure} ({said}). {advice}") from found


def check_weight_files(folder: Path) -> None:
    """Check that each file of weights is whole by its header, and that all that an index names are there.

    Args:
        folder: of a model; the weights themselves are not read.

    Raises:
        UserError: a file is truncated, damaged or missing.
    """
    from safetensors import safe_open

    again = "Download or save the model again."
    for path in sorted(folder.glob("*.safetensors")):
        with one_line(f"{path}: the file of weights is damaged or not whole", again):
            safe_open(path, framework="numpy")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        if (folder / index.name.removesuffix(".index.json")).is_file():
            continue  # the whole file is read then
        with one_line(f"{index}: the index of weights cannot be read", again):
            names = set(read_json(index)["weight_map"].values())
        if missing := sorted(name for name in names if not (folder / name).is_file()):
            raise UserError(
                f"{folder}: expected the files of weights that {index.name} names, found no {_some(missing)}. {again}"
            )


def check_weights(model: Any, info: Mapping[str, Any], where: Path) -> None:
    """Check that a model's weights are those of its files: none made up, none left out.

    Weights of parts that the model does not have, such as another head, are only named in the log.

    Args:
        model: as transformers loaded it.
        info: what transformers says of its loading.
        where: its files, for messages.

    Raises:
        UserError: weights are missing, or the model's own parts have no place for some.
    """
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{where}: weights are missing in its files: {_some(missing)}. Download or save the model again."
        )
    from transformers import PreTrainedModel

    unexpected = sorted(key for key in info["unexpected_keys"] if not _NO_WEIGHT.search(key))
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    own = {name for module in models for name, _ in module.named_children()}
    if left_out := [key for key in unexpected if own.intersection(key.split("."))]:
        raise UserError(
            f"{where}: its files hold weights that the model its config.json describes has no place for: "
            f"{_some(left_out)}. Fix config.json (such as attention_bias, num_hidden_layers), or give the model "
            "that belongs to it."
        )
    if unexpected:
        logger.warning("%s: weights of parts that are not used: %s", where, _some(unexpected))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" ... ({len(names)} in all)" if len(names) > 3 else "")
