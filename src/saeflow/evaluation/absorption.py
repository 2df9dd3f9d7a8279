"""Feature absorption on first letters, as SAEBench 0.6.0 defines it (Chanin et al. 2024, arXiv 2409.14507).

A latent that should fire on every word with s may stay silent on `snake`, whose own latent then carries the letter as
well: it has absorbed it. A logistic probe of the activation knows the letter; the few latents that tell it best are
the letter's own (`split` where there are several). Absorption is what other latents write along the probe's direction
while the letter's own are silent, or too weak.

Two things differ from SAEBench: a word has one prompt, which serves every step, where SAEBench draws new examples for
the last one; and probes start at zero, not at random.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from saeflow.evaluation.setup import Setup
from saeflow.evaluation.spelling import LETTERS, activations, first_letter, prompts, words_of
from saeflow.sources.models import load_tokenizer

logger = logging.getLogger(__name__)

MEAN = "mean"
SMALL_MODEL, SMALL_DICTIONARY = 10**9, 16384
"""Parameters and latents below which the measure says little: such models hardly spell (SAEBench's own warning)."""

# SAEBench 0.6.0, evals/absorption: probing.py and k_sparse_probing.py.
_EPOCHS = 50
_RATES = 1e-2, 1e-5
_PROBE_BATCH, _PROBE_DECAY = 64, 1e-4
_SPARSE_BATCH, _SPARSE_DECAY = 4096, 1e-6
_STEPS = 500
_SILENT = 1e-8


@dataclass(frozen=True)
class Words:
    """Words of one split.

    Attributes:
        x: (words, d_in) float32 activations.
        latents: (words, d_sae) sparse, in units of their decoder rows' norms.
        letters: (words,) index of the first letter in LETTERS.
    """

    x: np.ndarray
    latents: sparse.csr_array
    letters: np.ndarray


def absorb(sae: Any, setup: Setup, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Absorption of one SAE of a language model.

    Args:
        sae: on the setup's device.
        setup: of the text source and hook point it was trained on.
        settings: evaluation.interpretability.absorption of the parameters.

    Returns:
        Lines: see `measure`.

    Raises:
        UserError: too few words, a template without {word}, a tokenizer without offsets.
    """
    assert setup.in_model is not None
    assert setup.folders.model is not None
    model: Any = setup.in_model.model
    tokenizer: Any = load_tokenizer(setup.folders.model)
    parameters = sum(part.numel() for part in model.parameters())
    if parameters < SMALL_MODEL or sae.d_sae < SMALL_DICTIONARY:
        logger.warning(
            "absorption: the model has %.2g parameters and the SAE %d latents; below %.0e and %d the measure means nothing",
            parameters, sae.d_sae, SMALL_MODEL, SMALL_DICTIONARY,
        )  # fmt: skip
    rng = np.random.default_rng(settings["seed"])
    words = rng.permutation(words_of(tokenizer))[: settings["words"]].tolist()
    cut = int(len(words) * settings["train_share"])
    norms = sae.directions().detach().norm(dim=1)
    splits = []
    for number, part in enumerate((words[:cut], words[cut:])):
        asked = prompts(part, settings["template"], settings["examples"], settings["seed"] + number)
        x = activations(
            model, tokenizer, setup.hook_point, asked, setup.source_params, setup.device
        )
        with torch.inference_mode():
            codes = [
                sparse.csr_array((sae.encode(rows.to(setup.device)) * norms).float().cpu().numpy())
                for rows in torch.from_numpy(x).split(setup.settings["batch_size"])
            ]
        letters = np.array([LETTERS.index(first_letter(word)) for word in part])
        splits.append(Words(x, sparse.csr_array(sparse.vstack(codes)), letters))
    directions = (sae.directions().detach() / norms.clamp(min=1e-30)[:, None]).float().cpu().numpy()
    train, test = splits
    return measure(train, test, directions, settings, setup.device)


def measure(
    train: Words,
    test: Words,
    directions: np.ndarray,
    settings: Mapping[str, Any],
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Absorption of each first letter, and the means over those that the probe finds.

    Args:
        train: words that probes are fitted on.
        test: words that everything is measured on.
        directions: (d_sae, d_in) unit decoder rows.
        settings: max_k, f1_jump, l1, min_probe_f1, min_letters, full_cosine, fraction_cosine, projection_share, absorbers,
            seed.
        device: where probes are trained.

    Returns:
        Lines: the columns of the table `absorption` beside the id columns. A letter
        without words in one of the splits has no line. Last, the line `mean`; where fewer than min_letters count, it
        has no absorption.
    """
    from sklearn.metrics import f1_score

    letters = [i for i in range(len(LETTERS)) if (train.letters == i).any() and (test.letters == i).any()]  # fmt: skip
    answers = train.letters[:, None] == np.array(letters)
    generator = torch.Generator().manual_seed(settings["seed"])
    probe, bias = fit_probes(train.x, answers, _PROBE_BATCH, _PROBE_DECAY, 0.0, generator, device)
    scores = test.x @ probe.T + bias
    selector, _ = fit_probes(
        train.latents, answers, _SPARSE_BATCH, _SPARSE_DECAY, settings["l1"], generator, device
    )
    lines = []
    for place, letter in enumerate(letters):
        said, true = scores[:, place] > 0, test.letters == letter
        order = np.argsort(-selector[place], kind="stable")[: settings["max_k"]]
        own, sparse_f1 = split_latents(train, test, letter, order, settings["f1_jump"])
        probe_f1 = float(f1_score(true, said, zero_division=0))
        found = np.flatnonzero(true & said)
        counted = probe_f1 > settings["min_probe_f1"] and len(found) > 0
        line = {
            "letter": LETTERS[letter], "words": int(true.sum()), "probe_f1": probe_f1, "true_positives": len(found),
            "split_latents": len(own), "latents": " ".join(map(str, own)), "sparse_f1": sparse_f1, "counted": int(counted),
        }  # fmt: skip
        if counted:
            fractions, full = absorbed(
                test.x[found], test.latents[found], directions, probe[place], own, settings
            )
            line |= {
                "absorption_fraction": float(fractions.mean()),
                "full_absorption": float(full.mean()),
            }
        lines.append(line)
    return [*lines, _mean(lines, settings["min_letters"])]


def _mean(lines: Sequence[Mapping[str, Any]], fewest: int) -> dict[str, Any]:
    counted = [line for line in lines if line["counted"]]
    means: dict[str, Any] = {"letter": MEAN, "words": sum(line["words"] for line in lines)}
    means["counted"] = len(counted)
    if len(counted) < fewest:
        logger.warning(
            "absorption: the model tells %d first letters, expected at least %d: no mean", len(counted), fewest
        )  # fmt: skip
        return means
    names = ("probe_f1", "split_latents", "sparse_f1", "absorption_fraction", "full_absorption")
    return means | {name: float(np.mean([line[name] for line in counted])) for name in names}


def fit_probes(
    inputs: np.ndarray | sparse.csr_array,
    answers: np.ndarray,
    batch_size: int,
    weight_decay: float,
    l1: float,
    generator: torch.Generator,
    device: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Logistic probes of several questions at once, yes weighted up to no, by Adam at a falling rate.

    Args:
        inputs: (rows, n), dense or sparse.
        answers: (rows, questions) bool, both answers in each column.
        batch_size: rows a step.
        weight_decay: Adam's.
        l1: weight of the mean over questions of the sum of |weights|.
        generator: draws the order of the rows.
        device: where they are trained.

    Returns:
        (questions, n) weights, (questions,) biases.
    """
    rows, n = inputs.shape
    y = torch.from_numpy(answers).to(device, torch.float32)
    yes = y.sum(0)
    weights, biases = (
        torch.zeros(size, device=device, requires_grad=True)
        for size in ((y.shape[1], n), (y.shape[1],))
    )  # at zero, not drawn as in SAEBench: with few words and latents what is drawn would decide
    optimizer = torch.optim.Adam([weights, biases], lr=_RATES[0], weight_decay=weight_decay)
    fall = (_RATES[1] / _RATES[0]) ** (1 / _EPOCHS)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=fall)
    loss_of = torch.nn.BCEWithLogitsLoss(pos_weight=(rows - yes) / yes)
    for _ in range(_EPOCHS):
        for batch in torch.randperm(rows, generator=generator).split(batch_size):
            part = _dense(inputs, batch).to(device)
            loss = loss_of(part @ weights.t() + biases, y[batch.to(device)])
            loss = loss + l1 * weights.abs().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return weights.detach().cpu().numpy(), biases.detach().cpu().numpy()


def _dense(inputs: np.ndarray | sparse.csr_array, rows: Tensor) -> Tensor:
    part = inputs[rows.numpy()]
    return torch.from_numpy(part.toarray() if sparse.issparse(part) else part)


def split_latents(
    train: Words, test: Words, letter: int, order: np.ndarray, jump: float
) -> tuple[list[int], float]:
    """A letter's own latents: the first, and the next while F1 on `test` rises by more than `jump`.

    Args:
        train, test: words.
        letter: index in LETTERS.
        order: latents, the most telling first.
        jump: of F1.

    Returns:
        The latents, and F1 of the logistic probe of them.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    y_train, y_test = train.letters == letter, test.letters == letter
    columns = [split.latents[:, order].toarray() for split in (train, test)]
    kept, best = 0, -np.inf
    for k in range(1, len(order) + 1):
        model = LogisticRegression(max_iter=_STEPS, class_weight="balanced")
        model.fit(columns[0][:, :k], y_train)
        f1 = float(f1_score(y_test, model.predict(columns[1][:, :k]), zero_division=0))
        if f1 <= best + jump:
            break
        kept, best = k, f1
    return order[:kept].tolist(), best


def absorbed(
    x: np.ndarray,
    latents: sparse.csr_array,
    directions: np.ndarray,
    probe: np.ndarray,
    own: Sequence[int],
    settings: Mapping[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    """Measure how much of a letter's direction other latents write, word by word.

    With the probe's unit direction u: p = <x, u>, and latent i writes z_i <d_i, u>. o is the sum over the letter's own
    latents, a that over the largest `absorbers` others among those with cosine <d_i, u> of at least fraction_cosine.

    Args:
        x: (words, d_in) activations of words that the probe finds.
        latents: (words, d_sae) of them, sparse.
        directions: (d_sae, d_in) unit decoder rows.
        probe: (d_in,) weights.
        own: the letter's latents.
        settings: full_cosine, fraction_cosine, projection_share, absorbers.

    Returns:
        (words,) fractions: 0 where o >= p, p <= 0 or a < projection_share p, else 1 where o <= 0, else
        min(a, p - o) / (min(a, p - o) + o). (words,) bool: absorbed in full, where no own latent fires, p > 0, and the
        latent that writes most along u has cosine full_cosine at least and writes projection_share p at least.
    """
    u = probe / np.linalg.norm(probe)
    cosines = directions @ u
    z = latents.toarray()
    written, p = z * cosines, x @ u
    share = settings["projection_share"]
    o = written[:, own].sum(1)
    may = (cosines >= settings["fraction_cosine"]) & ~np.isin(np.arange(len(cosines)), own)
    others = np.sort(np.where(may, written, 0).clip(min=0), axis=1)
    a = others[:, ::-1][:, : settings["absorbers"]].sum(1)
    taken = np.minimum(a, p - o)
    is_none = (o >= p) | (p <= 0) | (a < share * p)
    with np.errstate(divide="ignore", invalid="ignore"):
        partly = np.clip(taken / (taken + o), 0, 1)
    fractions = np.where(is_none, 0, np.where(o <= 0, 1, partly))
    top = written.argmax(1)
    most = written[np.arange(len(z)), top]
    silent = (z[:, own] < _SILENT).all(1)
    full = silent & (cosines[top] >= settings["full_cosine"]) & (p > 0) & (most >= share * p)
    return fractions, full
