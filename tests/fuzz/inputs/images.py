"""Images of every format with damaged headers, EXIF and bodies; folders of them."""

import functools
import io
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np

from .models import clip
from .reading import (
    REFUSED,
    demand,
    read,
    rotten,
    said,
)


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
