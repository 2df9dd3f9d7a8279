"""Measure SAEs and baselines of one store: the same rows, the same functions, one table."""

import io
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file
from torch import Tensor

from saeflow.errors import UserError
from saeflow.evaluation.baselines import baselines
from saeflow.evaluation.by_dimension import PerRow
from saeflow.evaluation.contexts import ContextMeans
from saeflow.evaluation.controls import OwnK, control_lines
from saeflow.evaluation.dimension import DIMENSIONS
from saeflow.evaluation.images import KINDS, PerImage, PerKind, write_cards
from saeflow.evaluation.intervals import PerContext, interval_lines
from saeflow.evaluation.latents import BINS, LOWEST, logit_lens, write_latents
from saeflow.evaluation.measure import Measured, Observer, measure_rows
from saeflow.evaluation.rows import RowSelection, RowStatistics, row_statistics
from saeflow.evaluation.splice import ModelInTheLoop
from saeflow.evaluation.zero_shot import LabelledSets
from saeflow.stores import open_store
from saeflow.tables.evaluations import Evaluation, write_evaluation
from saeflow.tables.metrics import brief
from saeflow.tables.runs import identify

logger = logging.getLogger(__name__)
_LENS = 6  # tokens each way
_PICTURE = 96
_PIECE = 65_536  # rows


class Bench:
    """What every SAE of one (source, hook point) is measured on.

    Args:
        results: the results folder.
        source, hook_point: name the store that the SAEs are trained on: its training split gives the norm limit,
            the mean row and what baselines are fitted to.
        evaluation: `evaluation` of the parameters.
        device: where SAEs and the model run.
        on: the source whose held-out rows are measured, of the same model; None for `source`.
    """

    def __init__(
        self,
        results: Path,
        source: str,
        hook_point: str,
        evaluation: Mapping[str, Any],
        device: str,
        on: str | None = None,
    ) -> None:
        self.source = source
        self.on = on or source
        self.hook_point = hook_point
        self.evaluation = evaluation
        self.device = device
        self.batch_size: int = evaluation["batch_size"]
        evaluations = results / "evaluations" / source / hook_point
        self._train = results / "stores" / source / "train"
        self._held_out = results / "stores" / self.on / "evaluation"
        self._model = results / "sources" / source / "model"
        self._inputs = results / "sources" / self.on / "inputs"
        self._clean = evaluations / "clean"
        if self.on != source and not self.is_vision:
            self._clean = evaluations / "on" / self.on
        self._dimension = results / "evaluations" / self.on / hook_point / "dimension"

    @property
    def inputs(self) -> list[Path]:
        """The result folders that a measurement reads."""
        found = [self._train, self._held_out]
        found += [self._model, self._clean] if self._model.exists() else [self._inputs]
        if self.is_vision and self._inputs not in found:
            found.append(self._inputs)
        if self.evaluation["dimension"] is not None:
            found.append(self._dimension)
        return found

    @property
    def shown(self) -> list[Path]:
        """The result folders that hold what contexts are: tokens or pixels."""
        return [self._inputs]

    @property
    def subfolder(self) -> str:
        """The folder of what is measured on another source, in a run's own; empty for its own source."""
        return "" if self.on == self.source else self.on

    @property
    def where(self) -> str:
        """Where rows are from, as a log line says it."""
        return f" on {self.on}" if self.subfolder else ""

    @cached_property
    def is_vision(self) -> bool:
        """Whether the rows are tokens of images."""
        return bool(self.source_params["kind"] == "vision")

    @cached_property
    def train(self) -> Any:
        """The training split's store."""
        return open_store(self._train / f"{self.hook_point}.zarr")

    @cached_property
    def held_out(self) -> Any:
        """The evaluation split's store."""
        return open_store(self._held_out / f"{self.hook_point}.zarr")

    @cached_property
    def contexts(self) -> int:
        """Contexts (texts, images, samples) of the evaluation split."""
        starts = range(0, self.held_out.rows, _PIECE)
        pieces = (self.held_out.column("context", start, start + _PIECE) for start in starts)
        return max(int(piece.max()) for piece in pieces) + 1

    @cached_property
    def source_params(self) -> Mapping[str, Any]:
        """The parameters that the measured rows were made with."""
        return dict(self.held_out.attrs["source_params"])

    @cached_property
    def selection(self) -> RowSelection:
        """Which rows are measured; the norm limit comes from the training split."""
        multiple = self.evaluation["max_norm_multiple"]
        skips = self.evaluation["skip_first"] and self.source_params["kind"] == "text"
        return RowSelection(
            positions="rest" if skips else "all",
            norm_limit=None if multiple is None else multiple * self.train.median_norm,
        )

    @cached_property
    def statistics(self) -> RowStatistics:
        """Count and mean of the measured rows."""
        return row_statistics(self.held_out, self.selection, self.batch_size, self.device)

    @cached_property
    def kinds(self) -> dict[str, RowStatistics]:
        """Count and mean of CLS tokens and patches, where the store has both."""
        if not self.is_vision or self.source_params["tokens"] != "all":
            return {}
        limit = self.selection.norm_limit
        return {
            kind: row_statistics(
                self.held_out, RowSelection(positions=positions, norm_limit=limit),
                self.batch_size, self.device,
            )
            for kind, positions in KINDS.items()
        }  # fmt: skip

    @cached_property
    def features(self) -> Tensor | None:
        """(n_features, d_in) true dictionary of a synthetic source."""
        if self.source_params["kind"] != "synthetic":
            return None
        return load_file(self._inputs / "dictionary.safetensors")["features"]

    @cached_property
    def model_in_the_loop(self) -> ModelInTheLoop | None:
        """The source's language model with its clean side, where it has one."""
        if self.is_vision or not self._model.exists():
            return None
        return ModelInTheLoop(self._clean, self._model, self.device)

    @cached_property
    def labelled_sets(self) -> LabelledSets | None:
        """The labelled sets of a vision source, with its model."""
        return LabelledSets(self._clean, self._model, self.device) if self.is_vision else None

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of a text source's model."""
        from saeflow.sources.models import load_tokenizer

        return load_tokenizer(self._model)

    def tokens(self, split: str) -> np.ndarray:
        """(contexts, length) token ids of a text's split, mapped from disk."""
        return np.load(self._inputs / f"{split}.npy", mmap_mode="r")

    def known(self, split: str) -> dict[str, Any]:
        """What the source knows of its rows beside the store's columns, see `tasks`."""
        if self.source_params["kind"] == "text":
            from saeflow.sources.documents import document_kinds
            from saeflow.sources.models import token_texts

            known: dict[str, Any] = {"strings": token_texts(self.tokenizer)}
            kinds = document_kinds(self.source_params["text"])
            if kinds is not None:
                known["all_kinds"] = set(kinds.tolist())
                known["kinds"] = kinds[np.load(self._inputs / f"{split}_documents.npy")]
            return known
        if self.is_vision:
            from saeflow.sources.vision import image_facts

            return {"classes": image_facts(self._inputs)["classes"] or []}
        return {}

    @property
    def pixels(self) -> np.ndarray:
        """(images, height, width, 3) uint8 of a vision source's evaluation split, mapped from disk."""
        return np.load(self._inputs / "evaluation.npy", mmap_mode="r")

    @property
    def cover(self) -> np.ndarray | None:
        """(images, down, across) class of the object on each patch of scenes, -1 for none."""
        path = self._inputs / "evaluation_cover.npy"
        return np.load(path) if path.exists() else None

    @cached_property
    def dimensions(self) -> dict[str, np.ndarray]:
        """Local intrinsic dimension of the first rows; nothing where it is not asked for."""
        path = self._dimension / DIMENSIONS
        return dict(load_arrays(path)) if self._dimension in self.inputs else {}

    @property
    def policy(self) -> dict[str, float]:
        """The row policy, as metrics that stand beside the others in every table."""
        multiple = self.evaluation["max_norm_multiple"]
        skipped = self.selection.positions == "rest" or self.source_params.get("skip_first", False)
        return {
            "rows": float(self.statistics.rows),
            "excluded_rows_fraction": self.statistics.excluded_fraction,
            "first_position_excluded": float(skipped),
            **({} if multiple is None else {"max_norm_multiple": float(multiple)}),
        }

    def measure(
        self, sae: Any, *, is_trained: bool
    ) -> tuple[Evaluation, Measured, PerImage | None]:
        """Every metric of one SAE or baseline.

        Args:
            sae: see `measure_rows`; `forward` is what is spliced into the model.
            is_trained: it is an SAE: compare its decoder with the true dictionary, where there is one,
                and classify images through a few of its latents.
        """
        per_image: PerImage | None = None
        means: ContextMeans | None = None
        per_row: PerRow | None = None
        observers: list[Observer] = [PerKind(self.kinds)] if self.kinds else []
        if self.is_vision and is_trained:
            cards = self.evaluation["concept_cards"]
            among = min(cards["among"], len(self.pixels)) if cards else 0
            means = per_image = PerImage(len(self.pixels), self.held_out.columns, among)
            observers.append(means)
        elif is_trained:
            means = ContextMeans(self.contexts, self.held_out.columns)
            observers.append(means)
        settings = self.evaluation.get("bootstrap")
        per_context, own_k = PerContext(self.contexts), OwnK(self.statistics.rows)
        if settings is not None:
            observers += [per_context, own_k]
        if self.dimensions and is_trained:
            per_row = PerRow(len(self.dimensions["norm"]))
            observers.append(per_row)
        measured = measure_rows(
            sae, self.held_out, self.selection, self.statistics, self.batch_size, self.device,
            self.features if is_trained else None, observers,
        )  # fmt: skip
        metrics = self.policy | measured.metrics
        tables: dict[str, list[dict[str, Any]]] = {}
        in_the_loop: dict[str, np.ndarray] = {}
        if means is not None:
            tables["contexts"] = means.lines(self.evaluation["contexts_listed"])
        if per_row is not None:
            tables["dimension"] = per_row.lines(self.dimensions)
            tables["dimension_bins"] = per_row.bins(self.dimensions)
        if self.model_in_the_loop is not None:
            in_the_loop = self.model_in_the_loop.sums(sae.forward)
            metrics |= self.model_in_the_loop.metrics(in_the_loop)
        if settings is not None:
            sums = [per_context.sums, in_the_loop] if in_the_loop else [per_context.sums]
            tables["intervals"] = [line for one in sums for line in interval_lines(one, settings)]
            if own_k.k is not None:
                tables["controls"] = control_lines(
                    sae, self.held_out, self.selection, self.statistics, self.batch_size, self.device,
                    own_k, per_context.sums, self.contexts, settings,
                )  # fmt: skip
        if self.labelled_sets is not None and self.on == self.source:  # they are their own images
            accuracies, lines = self.labelled_sets.evaluate(sae, top_n=is_trained)
            metrics |= accuracies
            tables["classification"] = lines
        return Evaluation(self.on, metrics, measured.histograms, tables), measured, per_image

    def words(self, sae: Any) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, Any]]:
        """Of a text source: the logit lens where decoder rows reach the lm head, token ids, facts of a page."""
        from saeflow.sources.hook_points import final_norm
        from saeflow.sources.models import token_texts

        if self.model_in_the_loop is None:
            raise UserError(
                f"evaluation.latents.runs: expected SAEs of a model's activations, found {self.source}, which has "
                "no model. Take another run."
            )
        model, tokenizer = self.model_in_the_loop.model, self.tokenizer
        lens = logit_lens(model, final_norm(model), sae.directions(), _LENS)
        inside = token_texts(tokenizer)  # which has none for special ones
        facts = {"unit": "tokens", "strings": lambda t: inside(t) or tokenizer.decode([t])}
        return lens, self.tokens("evaluation"), facts

    def pictures(self, settings: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, int]]:
        """Of a vision source: facts of a page, and settings with the patches that an image shows."""
        from saeflow.sources.preprocessing import load_preprocessing

        down, across = load_preprocessing(self._model).grid
        if self.source_params["tokens"] == "cls":
            down, across, first = 1, 1, 0
        else:
            first = 1
        window = {"patches": down * across, "first": first, **settings}
        facts = {"unit": "tokens of images", "pictures": partial(_png, self.pixels)}
        return facts | {"grid": [down, across]}, window

    def write_cards(self, sae: Any, measured: Measured, per_image: PerImage, folder: Path) -> None:
        """Pictures of the concepts of an SAE of images; see `write_cards`."""
        settings = self.evaluation["concept_cards"]
        if settings is None or self.labelled_sets is None:
            return
        from saeflow.sources.preprocessing import load_preprocessing

        settings = dict(settings, among=per_image.among)
        write_cards(
            sae, self.held_out, self.selection, per_image, measured.fired, self.pixels, self.cover,
            load_preprocessing(self._model).grid, partial(self.labelled_sets.name_concepts, sae), settings,
            self.batch_size, self.device, folder,
        )  # fmt: skip

    def check_fits(self, config: Mapping[str, Any]) -> None:
        """Refuse an SAE that was trained on something else.

        An SAE from elsewhere knows no digest of its model and no scale; what it does know is compared.

        Raises:
            UserError: source, hook point, width, model or scale differ.
        """
        run = config["name"]
        trained_on = f"{config['source']}/{config['hook_point']}"
        here = f"{self.source}/{self.hook_point}"
        if trained_on != here:
            raise UserError(
                f"{self.held_out.path}: expected activations of {trained_on}, which SAE {run} was "
                f"trained on, found {here}. Evaluate it on its own store."
            )
        if config["d_in"] != self.held_out.d_in:
            raise UserError(
                f"{self.held_out.path}: expected activations of width {config['d_in']}, which SAE "
                f"{run} was trained on, found {self.held_out.d_in}. Train the SAE again on this store."
            )
        again = f"{run} was trained on, found {{}}. Train the SAE again on this store."
        model, here_model = config.get("model"), self.held_out.model
        if model is not None and model != here_model:
            raise UserError(
                f"{self.held_out.path}: expected activations of the model {model[:12]}, which SAE "
                + again.format((here_model or "none")[:12])
            )
        scale = config.get("scale")
        if scale is not None and not math.isclose(scale, self.train.scale, rel_tol=1e-6):
            raise UserError(
                f"{self.train.path}: expected activations of scale {scale:g}, which SAE "
                + again.format(f"{self.train.scale:g}")
            )


def benches(
    results: Path, source: str, hook_point: str, evaluation: Mapping[str, Any], device: str
) -> list[Bench]:
    """The bench of a store, and one for each source of `also_on`, which says what is particular to that source."""
    chosen = {key: value for key, value in evaluation.items() if key != "also_on"}
    others = evaluation.get("also_on", {})
    return [
        Bench(results, source, hook_point, chosen, device),
        *(
            Bench(results, source, hook_point, chosen | own, device, on)
            for on, own in others.items()
        ),
    ]


def evaluate_sae(
    sae: Any, config: Mapping[str, Any], benches: Sequence[Bench], folder: Path
) -> None:
    """Measure one trained SAE and write its tables.

    Args:
        sae: as `saeflow.load` returns it.
        config: its config.json.
        benches: of the source and hook point it was trained on, the first measures on this source itself.
        folder: written: the tables of the job `evaluate`, and concept
            cards of images, those of another source in a folder of its name.

    Raises:
        UserError: the SAE was trained on other activations, or a measurement has no value.
    """
    results = []
    for bench in benches:
        bench.check_fits(config)
        sae = sae.to(bench.device).eval()
        found, measured, per_image = bench.measure(sae, is_trained=True)
        logger.info("%s%s: %s", config["name"], bench.where, brief(found.metrics))
        results.append((identify(config), found))
        if per_image is not None:
            place = folder / bench.subfolder
            place.mkdir(exist_ok=True)
            bench.write_cards(sae, measured, per_image, place)
    write_evaluation(folder, results)


def collect_latents(
    sae: Any,
    config: Mapping[str, Any],
    bench: Bench,
    settings: Mapping[str, int],
    folder: Path,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What the page of latent cards shows of one trained SAE.

    Args:
        sae: as `saeflow.load` returns it.
        config: its config.json.
        bench: of the source and hook point it was trained on.
        settings: evaluation.latents of the parameters.
        folder: gets latents.safetensors.

    Returns:
        The arrays of `write_latents`, and what `write_page` is told about them.

    Raises:
        UserError: the SAE was trained on other activations, or on some that no model made.
    """
    bench.check_fits(config)
    sae = sae.to(bench.device).eval()
    facts: dict[str, Any] = {
        "run": config["name"], "d_sae": config["d_sae"], "bins": BINS, "lowest": LOWEST,
    }  # fmt: skip
    lens, tokens = None, None
    if bench.is_vision:
        more, window = bench.pictures(settings)
    else:
        lens, tokens, more = bench.words(sae)
        window = {key: value for key, value in settings.items() if key != "contexts"}
    arrays = write_latents(
        sae, bench.held_out, bench.selection, tokens, window, bench.batch_size, bench.device, folder, lens
    )  # fmt: skip
    return arrays, facts | more


def evaluate_baselines(ranks: list[int], benches: Sequence[Bench], folder: Path) -> None:
    """Measure identity, mean and PCA of a store and write their tables.

    Args:
        ranks: of PCA; those that are not below the store's width are left out.
        benches: of the store: baselines are fitted to its training split.
        folder: written: metrics.csv and histograms.csv.
    """
    results = []
    own = benches[0]
    fitted = baselines(own.train, ranks, own.batch_size, own.device)
    for baseline, bench in itertools.product(fitted, benches):
        found, _, _ = bench.measure(baseline.to(bench.device).eval(), is_trained=False)
        name = f"{bench.source}/{bench.hook_point}/{baseline.variant}/k{baseline.width}"
        logger.info("%s%s: %s", name, bench.where, brief(found.metrics))
        ids = {
            "run": name,
            "source": bench.source,
            "hook_point": bench.hook_point,
            "entry": baseline.variant,
            "variant": baseline.variant,
            "schedule": "constant",
            "d_sae": baseline.width,
            "k": baseline.width,
            "seed": 0,
            "tokens": 0 if baseline.variant == "identity" else bench.train.rows,
        }
        results.append((ids, found))
    write_evaluation(folder, results)


def _png(pixels: np.ndarray, image: int) -> bytes:
    """One of (images, height, width, 3) uint8, at most _PICTURE pixels across."""
    from PIL import Image

    held = io.BytesIO()
    picture = Image.fromarray(pixels[image])
    picture.thumbnail((_PICTURE, _PICTURE))
    picture.save(held, "PNG")
    return held.getvalue()
