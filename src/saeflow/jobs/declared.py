"""Every job of a plan: one method each, which states all that the job depends on.

A new job is a method here, a command in `saeflow.cli` and a rule in workflow/rules, which passes the method's result on.
The file is one list of methods, which is why it is longer than others.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar, cast

from saeflow.config import scorer_file
from saeflow.jobs.code import package_code
from saeflow.jobs.job import Job
from saeflow.plan import Plan

_ROW_POLICY = ("batch_size", "skip_first", "max_norm_multiple")
"""Options of `evaluation` that say which rows are measured."""

Method = TypeVar("Method", bound=Callable[..., Job])
Reads = dict[str, Job]


def _once(method: Method) -> Method:
    """Make each job once for each plan, so that its key is worked out once."""

    @functools.wraps(method)
    def kept(self: "Jobs", *names: str) -> Job:
        asked = (method.__name__, *names)
        if asked not in self._made:
            self._made[asked] = method(self, *names)
        return self._made[asked]

    return cast(Method, kept)


class Jobs:
    """The jobs of a plan.

    Args:
        plan: what a parameter file asks for.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.params = plan.params
        self._job = functools.partial(Job, package=package_code())
        self._made: dict[tuple[str, ...], Job] = {}

    # Sources

    @_once
    def model(self, source: str) -> Job:
        values, first = self.plan.source(source), self.plan.same_model(source)
        model = values["model"]
        return self._job(
            command="fetch",
            result=f"sources/{source}/model",
            params={"model": model, "hook_points": values["hook_points"]},
            helps={"like": self.model(first)} if first else {},
            choices=_one_of("sources.models:ORIGINS", *model),
        )

    @_once
    def inputs(self, source: str) -> Job:
        values = self.plan.source(source)
        apart = (
            ("hook_points",) if self.plan.has_model(source) else ()
        )  # the model's, not the inputs'
        return self._job(
            command="prepare",
            result=f"sources/{source}/inputs",
            params={
                "source": {key: value for key, value in values.items() if key not in apart},
                "rows": self.plan.rows(source),
            },
            reads=self._model(source),
            choices=self._kind(source),
        )

    @_once
    def labelled(self, source: str, name: str) -> Job:
        return self._job(
            command="label",
            result=f"evaluations/{source}/labelled/{name}",
            params={"labelled": self.params["evaluation"]["labelled_sets"][name]},
            reads=self._model(source),
        )

    # Stores

    @_once
    def store(self, source: str, split: str) -> Job:
        apart = {"train": {"evaluation_rows"}, "evaluation": {"train_rows", "window_rows"}}[split]
        apart.add("keep_windows")  # how many are kept changes no row
        if self.plan.windows(source, split) == 1:
            apart.add("window_rows")
        layout = {k: v for k, v in self.params["stores"][source].items() if k not in apart}
        if split == "train" and self.plan.is_streamed(source):
            layout["is_streamed"] = True
        return self._job(
            command="merge",
            result=f"stores/{source}/{split}",
            params={
                "name": source, "source": self.plan.source(source), "store": layout, "split": split,
            },
            reads={**self._model(source), "inputs": self.inputs(source)},
            code=("cli.stores:extract",),
            choices=self._kind(source),
        )  # fmt: skip

    # Complexity

    @_once
    def scores(self, source: str, complexity: str) -> Job:
        scoring = self.plan.scoring(complexity)
        return self._job(
            command="score",
            result=f"complexity/{source}/{complexity}/scores",
            params={"scoring": scoring, "source": self.plan.source(source)},
            reads={**self._model(source), "inputs": self.inputs(source)},
            choices=(*self._kind(source), *_one_of("complexity.scorers:KINDS", scoring["kind"])),
        )

    @_once
    def probe(self, source: str, hook_point: str, complexity: str) -> Job:
        splits = self._splits(source)
        if self.plan.goes_by_window(source):  # whose windows may be gone, or not be there yet
            del splits["train"]
        return self._job(
            command="probe",
            result=f"complexity/{source}/{complexity}/probes/{hook_point}",
            params={
                "store": f"{source}/{hook_point}", "complexity": complexity, "range": self.plan.scoring(complexity)["range"],
            },
            reads={"scores": self.scores(source, complexity), **splits},
        )  # fmt: skip

    # SAEs

    @_once
    def sae(self, run: str) -> Job:
        """Make an SAE: train it, or take it over from another library."""
        if run in self.plan.imports:
            taken = self.plan.imports[run]
            return self._job(
                command="import",
                result=f"saes/{run}",
                params={"run": asdict(taken)},
            )
        config, complexity = self.plan.runs[run], self.plan.complexity(run)
        reads = {"train": self.store(config.source, "train")}
        if complexity:
            reads["probe"] = self.probe(config.source, config.hook_point, complexity)
        if config.guide:
            reads["guide"] = self.sae(config.guide)
        by_window = {"by_window": True} if self.plan.goes_by_window(config.source) else {}
        return self._job(
            command="train",
            result=f"saes/{run}",
            params={
                "run": asdict(config), "precision": self.params["runtime"]["precision"], **by_window,
            },
            reads=reads,
            choices=self._variants(run),
        )  # fmt: skip

    # Evaluation

    @_once
    def clean(self, source: str, hook_point: str, other: str) -> Job:
        """Run the model alone on inputs of `other`, the source itself or one of the same model."""
        is_own = other == source
        in_model = self.plan.kind(other).in_model
        assert in_model is not None
        labelled = self.plan.labelled(other) if is_own else []
        return self._job(
            command="clean",
            result=f"evaluations/{source}/{hook_point}/" + ("clean" if is_own else f"on/{other}"),
            params={
                "source": self.plan.source(other), "hook_point": hook_point,
                **{name: self.params["evaluation"][name] for name in in_model.options},
            },
            reads={
                **self._model(other),
                "inputs": self.inputs(other),
                "train": self.store(source, "train"),
                "evaluation": self.store(other, "evaluation"),
                **{f"labelled/{name}": self.labelled(other, name) for name in labelled},
            },
            code=self._in_model(other),
            choices=self._kind(other),
        )  # fmt: skip

    @_once
    def dimension(self, source: str, hook_point: str) -> Job:
        return self._job(
            command="dimension",
            result=f"evaluations/{source}/{hook_point}/dimension",
            params={
                "source": source, "hook_point": hook_point, "dimension": self.plan.dimension(),
            },
            reads={"evaluation": self.store(source, "evaluation")},
        )  # fmt: skip

    @_once
    def evaluation(self, run: str) -> Job:
        place = self._place(run)
        return self._job(
            command="evaluate",
            result=f"evaluations/{run}",
            params={"evaluation": self.plan.evaluation(place[0])},
            reads={"sae": self.sae(run), **self._measured_on(*place), **self._others(*place)},
            code=self._in_model(place[0]),
            choices=(*self._kind(place[0]), *self._variants(run)),
        )

    @_once
    def baselines(self, source: str, hook_point: str) -> Job:
        return self._job(
            command="baselines",
            result=f"evaluations/{source}/{hook_point}/baselines",
            params={
                "store": f"{source}/{hook_point}", "evaluation": self.plan.evaluation(source),
                "pca_ranks": self.params["evaluation"]["pca_ranks"],
            },
            reads={**self._measured_on(source, hook_point), **self._others(source, hook_point)},
            code=self._in_model(source),
            choices=self._kind(source),
        )  # fmt: skip

    @_once
    def latents(self, run: str) -> Job:
        place = self._place(run)
        return self._job(
            command="latents",
            result=f"evaluations/latents/{run}",
            params={
                "latents": self.plan.latents(), "evaluation": self._row_policy(), "mark": self.plan.mark,
            },
            reads={"sae": self.sae(run), **self._measured_on(*place)},
            code=self._in_model(place[0]),
            choices=(*self._kind(place[0]), *self._variants(run)),
        )  # fmt: skip

    @_once
    def interpretation(self, run: str) -> Job:
        place, settings = self._place(run), self.plan.interpretability()
        own = scorer_file(settings)
        return self._job(
            command="interpret",
            result=f"evaluations/interpretability/{run}",
            params={"interpretability": settings, "evaluation": self._row_policy()},
            reads={"sae": self.sae(run), **self._measured_on(*place)},
            code=self._in_model(place[0]),
            choices=(*self._kind(place[0]), *self._variants(run)),
            files=(str(own),) if own else (),
        )

    @_once
    def stability(self, setting: str) -> Job:
        """Compare the seeds of one setting."""
        runs = self.plan.seeds[setting]
        source = self._place(runs[0])[0]
        return self._job(
            command="stability",
            result=f"evaluations/stability/{setting}",
            params={"evaluation": self._row_policy()},
            reads={"saes": [self.sae(run) for run in runs], **self._splits(source)},
            choices=(*self._kind(source), *self._variants(*runs)),
        )

    @_once
    def rivals(self) -> Job:
        """Compare SAEs that find their own k with those that are trained at what they found."""
        return self._job(
            command="rivals",
            result="evaluations/rivals",
            params={
                "rivals": self.plan.rivals, "runs": self.plan.compared,
                "bootstrap": self.params["evaluation"]["bootstrap"],
            },
            reads={"evaluations": list(map(self.evaluation, self.plan.compared))},
        )  # fmt: skip

    @_once
    def sweeps(self) -> Job:
        """Choose among the trials of tuned settings, and report on units that none was chosen on."""
        sweep = self.params["sweep"]
        return self._job(
            command="choose",
            result="evaluations/sweeps",
            params={
                "settings": self.plan.sweeps, "runs": self.plan.tried, "bootstrap": self.params["evaluation"]["bootstrap"],
                "sweep": {key: value for key, value in sweep.items() if key != "trials"},
            },
            reads={"evaluations": list(map(self.evaluation, self.plan.tried))},
        )  # fmt: skip

    # Tables, figures, report

    @_once
    def tables(self) -> Job:
        """Collect all tables, whose order is their own: that of the entries in a file changes no key."""
        plan = self.plan
        return self._job(
            command="collect",
            result="tables",
            reads={
                "evaluations": [
                    *map(self.evaluation, sorted(plan.evaluated)), *(self.baselines(*one) for one in plan.stores),
                ],
                "saes": list(map(self.sae, sorted(plan.runs))),
                "probes": [self.probe(*one) for one in plan.probes],
                "stability": list(map(self.stability, sorted(plan.seeds))),
                "rivals": [self.rivals()] if plan.rivals else [],
                "sweeps": [self.sweeps()] if plan.sweeps else [],
                "interpretations": list(map(self.interpretation, sorted(plan.interpreted))),
                "dimensions": [self.dimension(*one) for one in plan.with_dimension],
            },
        )  # fmt: skip

    @_once
    def figure(self, name: str) -> Job:
        """Draw a figure, or write one of the papers' tables."""
        return self._job(
            command="draw",
            result=f"figures/{name}",
            params={"figure": name, "options": self.plan.figure()},
            reads={"tables": self.tables()},
            code=(f"figures.{'papers' if name.startswith('table_') else 'plots'}.{name}",),
        )

    @_once
    def report(self) -> Job:
        names = self.params["figures"]["names"]
        return self._job(
            command="report",
            result="report.html",
            params={"figures": names, "pages": self.plan.pages, "mark": self.plan.mark},
            reads={
                "tables": self.tables(),
                "figures": list(map(self.figure, names)),
                "pages": list(map(self.latents, self.plan.pages)),
            },
        )

    def every(self) -> list[Job]:
        """All jobs of the plan, each after those that it reads."""
        last = [self.report(), *(self.store(*one) for one in self.plan.splits_of_sources())]
        found: dict[str, Job] = {}

        def add(job: Job) -> None:
            if job.result not in found:
                for one in job.before:
                    add(one)
                found[job.result] = job

        for job in last:
            add(job)
        return list(found.values())

    def work_out_keys(self) -> None:
        """Work out every key, and keep what of it takes time for the next run."""
        for job in self.every():
            assert job.key
        package_code().keep()

    # What several jobs depend on

    def _place(self, run: str) -> tuple[str, str]:
        return self.plan.evaluated[run].source, self.plan.evaluated[run].hook_point

    def _model(self, source: str) -> Reads:
        return {"model": self.model(source)} if self.plan.has_model(source) else {}

    def _splits(self, source: str) -> Reads:
        return {split: self.store(source, split) for split in ("train", "evaluation")}

    def _measured_on(self, source: str, hook_point: str) -> Reads:
        """Return the results that an SAE of a store is measured on."""
        reads = {**self._model(source), "inputs": self.inputs(source), **self._splits(source)}
        if self.plan.has_model(source):
            reads["clean"] = self.clean(source, hook_point, source)
        if self.plan.has_dimension(source):
            reads["dimension"] = self.dimension(source, hook_point)
        return reads

    def _others(self, source: str, hook_point: str) -> Reads:
        """Return the other sources' results that an SAE of a store is measured on (`evaluation.also_on`)."""
        reads = {}
        for other in self.plan.others(source):
            reads[f"on/{other}/evaluation"] = self.store(other, "evaluation")
            reads[f"on/{other}/inputs"] = self.inputs(other)
            if self.plan.kind(other).predicts_contexts:
                reads[f"on/{other}/clean"] = self.clean(source, hook_point, other)
            if self.plan.has_dimension(other):
                reads[f"on/{other}/dimension"] = self.dimension(other, hook_point)
        return reads

    def _row_policy(self) -> dict[str, Any]:
        return {key: self.params["evaluation"][key] for key in _ROW_POLICY}

    def _kind(self, source: str) -> tuple[tuple[str, str], ...]:
        return _one_of("sources.kinds:KINDS", self.params["sources"][source]["kind"])

    def _in_model(self, source: str) -> tuple[str, ...]:
        """The module that runs the source's model, which evaluation imports by this name."""
        in_model = self.plan.kind(source).in_model
        return (in_model.module.removeprefix("saeflow."),) if in_model else ()

    def _variants(self, *runs: str) -> tuple[tuple[str, str], ...]:
        """The variants of some runs, and of those that k is taken from; of an imported SAE it may be any."""
        if any(run in self.plan.imports for run in runs):
            return ()
        guides = [self.plan.runs[run].guide for run in runs]
        names = {self.plan.runs[run].variant for run in [*runs, *filter(None, guides)]}
        return _one_of("saes.variants:VARIANTS", *sorted(names))


def _one_of(table: str, *keys: str) -> tuple[tuple[str, str], ...]:
    return tuple((table, key) for key in keys)
