"""The page of latent cards: one HTML file that opens from disk, its data packed, its cards made as they are shown."""

import base64
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.figures.report import template, with_script
from saeflow.files import atomic_file

_OF_PATCHES = (
    " A frame is around the patch where the latent is strongest. CLS: it is strongest on the class token, which "
    "stands for the whole image and has no place in it."
)
_KINDS = {"uint8": "u1", "uint32": "u4", "float32": "f4"}


def write_page(arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], out: Path) -> None:
    """Write the page.

    Args:
        arrays: what `write_latents` found.
        facts: run, d_sae, unit (what a row is) and bins, lowest of the histogram; of text strings (by token id)
            and before (tokens of an example before its strongest); mark, printed in the head, where there is one; of
            images pictures (PNG) and titles (class), by context, grid (patches down and across) and first (position
            of the first patch).
        out: written: one HTML file.
    """
    packed, header = _packed(arrays, facts)
    render = template("latents.html.j2").render
    shown = {
        "run": facts["run"],
        "mark": facts.get("mark", ""),
        "about": (
            f"{facts['d_sae']:,} latents on {int(arrays['rows'][0]):,} held-out {facts['unit']}. Each card shows "
            "where the latent is strongest, one example a context, with its activation as colour; how strong it "
            "is where it fires; and the latents whose decoder rows point most alike."
            f"{_OF_PATCHES if facts.get('first') else ''}"
        ),
        "search": "class or latent number" if "pictures" in facts else "token or latent number",
    }
    data = base64.b64encode(gzip.compress(_joined(packed, header), mtime=0)).decode()
    page = render(facts=shown, data=data, script_hash="SCRIPT")
    with atomic_file(out) as staged:
        staged.write_text(with_script(page), encoding="utf-8")


def _packed(
    arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays as the page reads them, tokens and contexts as 1 + their place in a list, and its header."""
    packed: dict[str, np.ndarray] = {
        name: arrays[name].astype(np.float32) for name in ("maximum", "value", "cosines")
    }
    packed |= {
        name: arrays[name].astype(np.uint32) for name in ("fired", "histogram", "neighbours")
    }
    packed["shades"] = arrays["shades"]
    header: dict[str, Any] = {
        "latents": len(arrays["fired"]), "rows": int(arrays["rows"][0]), "unit": facts["unit"],
        "examples": arrays["value"].shape[1], "window": arrays["shades"].shape[2],
        "near": arrays["neighbours"].shape[1], "bins": facts["bins"], "lowest": facts["lowest"],
        "before": facts.get("before", 0), "lens": 0, "strings": [],
    }  # fmt: skip
    if "pictures" in facts:
        contexts, (packed["image"],) = _listed([arrays["context"]])
        pictures = [base64.b64encode(facts["pictures"](context)).decode() for context in contexts]
        packed["position"] = np.maximum(arrays["position"], 0).astype(np.uint32)
        titles = [facts["titles"](context) for context in contexts]
        return packed, header | {
            "images": pictures, "titles": titles, "grid": facts["grid"], "first": facts["first"],
        }  # fmt: skip
    names = ["token", *(name for name in ("raised", "lowered") if name in arrays)]
    tokens, places = _listed([arrays[name] for name in names])
    packed |= dict(zip(names, places, strict=True))
    header["strings"] = [facts["strings"](token) for token in tokens]
    header["lens"] = arrays["raised"].shape[1] if "raised" in arrays else 0
    return packed, header


def _listed(parts: list[np.ndarray]) -> tuple[list[int], list[np.ndarray]]:
    """Every number that occurs, in order, and the parts with 1 + its place; 0 where a number is below 0."""
    numbers = np.unique(np.concatenate([part.ravel() for part in parts]))
    numbers = numbers[numbers >= 0]
    places = [
        np.where(part < 0, 0, np.searchsorted(numbers, part) + 1).astype(np.uint32)
        for part in parts
    ]
    return [int(number) for number in numbers], places


def _joined(packed: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> bytes:
    """Length of the header, header, arrays at multiples of 4 bytes."""
    layout: list[list[Any]] = []
    text = b""
    for _ in range(8):  # until the header's own length no longer moves the arrays
        start = 4 + len(text)
        fresh = []
        for name, part in packed.items():
            start += -start % 4
            fresh.append([name, _KINDS[str(part.dtype)], start, part.size])
            start += part.nbytes
        text = json.dumps({**header, "layout": fresh}).encode()
        if fresh == layout:
            break
        layout = fresh
    out = bytearray(len(text).to_bytes(4, "little") + text)
    for (_, _, start, _), part in zip(layout, packed.values(), strict=True):
        out += bytes(start - len(out)) + part.astype(part.dtype.newbyteorder("<")).tobytes()
    return bytes(out)
