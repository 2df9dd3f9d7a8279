"""The page of latent cards in a real browser: what it shows, sorts and finds, and that it runs nothing else."""

import re
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saeflow.figures.latents import write_page

from ..browser import document

M, EXAMPLES, WINDOW = 60, 2, 4
EVIL = "<script>document.title='run'</script>"
STRINGS = [f" word{i}" for i in range(40)]


def arrays() -> dict[str, Any]:
    random = np.random.default_rng(0)
    fired = random.permutation(M) * 10
    tokens = random.integers(0, 39, (M, EXAMPLES, WINDOW)).astype(np.int32)
    tokens[:, :, 0] = -1
    tokens[17, 0, 1] = 39  # the peak of one latent alone
    return {
        "fired": fired, "maximum": random.permutation(M).astype(np.float32) + 1, "rows": np.array([1000]),
        "histogram": random.integers(0, 9, (M, 48)).astype(np.int32),
        "value": np.where(fired[:, None] > 0, random.random((M, EXAMPLES)) + 0.5, 0).astype(np.float32),
        "context": random.integers(0, 5, (M, EXAMPLES)).astype(np.int32),
        "shades": random.integers(0, 255, (M, EXAMPLES, WINDOW)).astype(np.uint8), "token": tokens,
        "raised": random.integers(0, 39, (M, 2)).astype(np.int32),
        "lowered": random.integers(0, 39, (M, 2)).astype(np.int32),
        "neighbours": random.integers(0, M, (M, 3)).astype(np.int32),
        "cosines": random.random((M, 3)).astype(np.float32),
    }  # fmt: skip


def facts(**more: Any) -> dict[str, Any]:
    known = {"run": f"s/h/{EVIL}/x", "d_sae": M, "unit": "tokens", "bins": 48, "lowest": -12.0}
    return {**known, "before": 1, "strings": [*STRINGS[:39], EVIL].__getitem__, **more}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "latents.html"
    write_page(arrays(), facts(), path)
    return path


def cards(html: str) -> list[int]:
    return [int(number) for number in re.findall(r'<article id="latent-(\d+)"', html)]


def live() -> list[int]:
    return [int(i) for i in np.flatnonzero(arrays()["fired"])]


def test_cards_show_the_numbers(page: Path, tmp_path: Path) -> None:
    html = document(page, tmp_path)
    assert cards(html)[:24] == live()[:24]
    assert f"{len(live())} of {M} latents" in html
    card = html.split("<article")[1]
    latent, known = live()[0], arrays()
    rate = 100 * known["fired"][latent] / 1000
    assert f"{rate:g} % of tokens" in card
    words = re.findall(r'<span class="peak"[^>]*>(.*?)</span>', card)
    assert words == [STRINGS[token] for token in known["token"][latent, :, 1]]
    for token in (*known["raised"][latent], *known["lowered"][latent]):
        assert f"<code>{STRINGS[token]}</code>" in card
    near = [
        f"{i} ({c:.2f})"
        for i, c in zip(known["neighbours"][latent], known["cosines"][latent], strict=True)
    ]
    assert re.findall(r"<a [^>]*>(.*?)</a>", card) == near
    assert card.count("<rect") >= 40


@pytest.mark.parametrize("sort", ["rate", "maximum"])
@pytest.mark.parametrize("order", ["down", "up"])
def test_sorting_orders_the_cards(page: Path, tmp_path: Path, sort: str, order: str) -> None:
    html = document(page, tmp_path, fragment=f"#sort={sort}&order={order}")
    key = arrays()[{"rate": "fired", "maximum": "maximum"}[sort]]
    expected = sorted(live(), key=lambda i: key[i], reverse=order == "down")
    assert cards(html)[:24] == expected[:24]


def test_searching_finds_tokens_and_numbers_and_dead_ones_on_request(
    page: Path, tmp_path: Path
) -> None:
    assert cards(document(page, tmp_path / "a", fragment="#q=43")) == [43]
    known = arrays()
    expected = [
        i for i in live()
        if " word7" in {STRINGS[t] if t < 39 else EVIL for t in (*known["token"][i, :, 1], *known["raised"][i], *known["lowered"][i])}
    ]  # fmt: skip
    html = document(page, tmp_path / "b", fragment="#q=word7")
    assert cards(html) == expected
    dead = int(np.flatnonzero(known["fired"] == 0)[0])
    html = document(page, tmp_path / "c", fragment="#dead=1&sort=rate&order=up")
    assert cards(html)[0] == dead
    assert "nothing (dead)" in html


def test_what_tokens_hold_is_shown_and_not_run(page: Path, tmp_path: Path) -> None:
    html = document(page, tmp_path / "a", fragment="#q=17")
    assert EVIL.replace("<", "&lt;").replace(">", "&gt;") in html
    assert "<title>Latents of s/h/&lt;script&gt;" in html
    unguarded = page.read_text().replace("</form>", f"</form>{EVIL}")
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    for name, text, title in (
        ("with", unguarded, "Latents of"),
        ("without", policy.sub("", unguarded), "run"),  # so this test can fail
    ):
        path = tmp_path / f"{name}.html"
        path.write_text(text)
        assert f"<title>{title}" in document(path, tmp_path / name)


def test_images_are_shown_under_their_masks(tmp_path: Path) -> None:
    known = {
        name: part for name, part in arrays().items() if name not in ("token", "raised", "lowered")
    }
    known["position"] = np.full((M, EXAMPLES), 3, np.int32)
    known["position"][live()[0]] = [4, 0]  # the last patch, and the class token
    path = tmp_path / "latents.html"
    told = {key: value for key, value in facts().items() if key not in ("strings", "before")}
    told |= {
        "pictures": lambda context: b"picture %d" % context, "titles": lambda context: f"{EVIL} {context}",
        "grid": [2, 2], "first": 1,
    }  # fmt: skip
    write_page(known, told, path)
    html = document(path, tmp_path / "profile", fragment=f"#q={live()[0]}")
    import base64

    shown = re.findall(r"data:image/png;base64,([^\"]+)\"", html)
    assert [base64.b64decode(one) for one in shown] == [
        b"picture %d" % context for context in known["context"][live()[0]]
    ]
    assert len(re.findall("<i[ >]", html)) == EXAMPLES * WINDOW
    first = known["context"][live()[0]]
    assert re.findall(r'class="title">(.*?)</div>', html) == [
        f"{escape(EVIL, quote=False)} {one}" for one in first
    ]
    assert "<title>run" not in html
    cells = re.findall(r"<i( [^>]*)?>", html)
    assert ['class="at"' in cell for cell in cells] == [False, False, False, True, *[False] * 4]
    values = re.findall(r"<span>[\d.]+(, row 2, column 2|, CLS)</span>", html)
    assert values == [", row 2, column 2", ", CLS"]
    assert "stands for the whole image" in html
    assert "grid-template-columns: repeat(2, 1fr)" in html


def test_the_same_arrays_give_the_same_bytes(page: Path, tmp_path: Path) -> None:
    write_page(arrays(), facts(), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()
