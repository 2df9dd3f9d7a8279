"""Printed tables: Markdown and LaTeX from the same headings, numbers and notes that the report's HTML shows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from saeflow.tables.files import Row
from saeflow.tables.metrics import METRICS, printed
from saeflow.tables.numbers import decimals, fixed
from saeflow.tables.runs import RANDOM_DECODER, is_baseline, sized_words
from saeflow.tables.schema import heading
from saeflow.tables.summary import PANEL, accuracies, policy_note

_WORDS = ("entry", "setting", "schedule", "seeds")


@dataclass(frozen=True)
class Printed:
    """A table as it is printed.

    Attributes:
        head: headings.
        words: how many of the first columns are no numbers.
        body: cells of each row.
        caption: one paragraph of plain text.
        rule_before: number of the row that a rule is drawn above; None for none.
        best: (row, column) of the cells that are printed bold.
    """

    head: list[str]
    words: int
    body: list[list[str]]
    caption: str
    rule_before: int | None = None
    best: frozenset[tuple[int, int]] = frozenset()

    def markdown(self) -> str:
        """Return the table without its caption."""
        rule = ["---"] * self.words + ["---:"] * (len(self.head) - self.words)
        body = self._body(lambda cell: f"**{cell}**", lambda cell: cell.replace("|", "\\|"))
        rows = (" | ".join(row) for row in (self.head, rule, *body))
        return "\n".join(f"| {row} |" for row in rows)

    def _body(self, bold: Callable[[str], str], escape: Callable[[str], str]) -> list[list[str]]:
        return [
            [
                bold(escape(cell)) if (line, column) in self.best else escape(cell)
                for column, cell in enumerate(row)
            ]
            for line, row in enumerate(self.body)
        ]

    def latex(self) -> str:
        """Return the table with its caption; needs \\usepackage{booktabs}."""
        cells = self._body(lambda cell: rf"\textbf{{{cell}}}", escape_latex)
        body = [" & ".join(row) + r" \\" for row in cells]
        if self.rule_before:
            body.insert(self.rule_before, r"\midrule")
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{escape_latex(self.caption)}}}",
                rf"\begin{{tabular}}{{{'l' * self.words}{'r' * (len(self.head) - self.words)}}}",
                r"\toprule",
                " & ".join(map(escape_latex, self.head)) + r" \\",
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "²": r"$^2$", "−": "$-$",
}  # fmt: skip


def escape_latex(text: str) -> str:
    """Return text for LaTeX: its special characters escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


def mean_and_deviation(line: Mapping[str, str], name: str) -> tuple[str, str]:
    """Return a summarised metric as it is printed: the deviation has as many decimals as the mean.

    Args:
        line: of the table `summary`.
        name: of the metric.

    Returns:
        Mean and standard deviation; empty where the line has none.
    """
    mean, spread = line.get(f"{name}_mean", ""), line.get(f"{name}_sd", "")
    if not mean:
        return "", ""
    metric = METRICS[name]
    scale = 100 if metric.percent else 1
    places = decimals(scale * float(mean), metric.digits)
    return metric.text(float(mean)), fixed(scale * float(spread), places) if spread else ""


def panels(lines: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Return the summary's lines by source, hook point and source measured on, in their order."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for line in lines:
        found.setdefault(tuple(line[name] for name in PANEL), []).append(line)
    return found


def shown(lines: Iterable[Mapping[str, str]]) -> list[str]:
    """Return the printed metrics that some line of a panel has."""
    return [name for name in printed() if any(line.get(f"{name}_mean") for line in lines)]


def best(lines: Sequence[Mapping[str, str]], name: str) -> set[int]:
    """Return the numbers of the SAEs' lines whose mean of a metric, as it is printed, is the best of its panel.

    There is none where the metric has no direction, or where only one SAE has it.
    """
    metric = METRICS[name]
    means = {
        number: float(line[f"{name}_mean"])
        for number, line in enumerate(lines)
        if not is_baseline(line)
        and RANDOM_DECODER not in line["entry"]
        and line.get(f"{name}_mean")
    }
    if not metric.better or len(means) < 2:
        return set()
    wanted = (min if metric.better == "lower" else max)(means.values())
    return {number for number, mean in means.items() if metric.text(mean) == metric.text(wanted)}


def note(
    lines: Sequence[Mapping[str, str]],
    unmeasured: Iterable[Mapping[str, str]] = (),
    tuning: str = "",
) -> str:
    """Say which rows a panel's numbers are of, what is not measured and why, what ± means, and how SAEs were tuned.

    Args:
        lines: of the table `summary`.
        unmeasured: rows of the table of that name, of any panels.
        tuning: the sentence on tuning.
    """
    policies = dict.fromkeys(policy_note(line) for line in lines if line["rows"])
    panel = [lines[0][name] for name in PANEL]
    missing = dict.fromkeys(
        f"{row['what'].capitalize()} is not measured: {row['why']}."
        for row in unmeasured
        if [row[name] for name in PANEL] == panel
    )
    parts = [*policies, *missing]
    if any(line.get(f"{name}_sd") for line in lines for name in printed()):
        parts.append("Means over seeds, ± one sample standard deviation.")
    if any(best(lines, name) for name in shown(lines)):
        parts.append("Bold: the best of the SAEs, at whatever L0.")
    return " ".join(filter(None, [*parts, tuning]))


def _summaries(
    lines: Iterable[Row], unmeasured: Iterable[Row], tuning: str
) -> list[tuple[str, Printed]]:
    """Return title and table of each panel."""
    found = []
    missing = list(unmeasured)
    for (source, hook_point, on), held in panels(lines).items():
        title = f"{source}{'' if on == source else f' on {on}'}, {hook_point}"
        names = shown(held)
        head = [*_WORDS, *map(heading, names)]
        body = []
        several = len({line["d_sae"] for line in held if not is_baseline(line)}) > 1
        for line in held:
            cells = (" ± ".join(filter(None, mean_and_deviation(line, name))) for name in names)
            body.append([*_words(line, several), *cells])
        saes = sum(not is_baseline(line) for line in held)
        rule = saes if 0 < saes < len(held) else None
        strong = frozenset(
            (number, len(_WORDS) + column)
            for column, name in enumerate(names)
            for number in best(held, name)
        )
        caption = f"{title}. {note(held, missing, tuning)}"
        found.append((title, Printed(head, len(_WORDS), body, caption, rule, strong)))
    return found


def _words(line: Row, several: bool) -> list[str]:
    """Return the first cells of a line; the setting as people write it, with the latents where they differ."""
    size = int(line["d_sae"]) if several and not is_baseline(line) else None
    setting = sized_words(line["setting"], size)
    return [setting if column == "setting" else line[column] for column in _WORDS]


def summary_markdown(lines: Iterable[Row], unmeasured: Iterable[Row] = (), tuning: str = "") -> str:
    """Return the summary as one Markdown table per panel, each with its note."""
    return "\n".join(
        f"## {title}\n\n{table.markdown()}\n\n{table.caption.removeprefix(f'{title}. ')}\n"
        for title, table in _summaries(lines, unmeasured, tuning)
    )


def summary_latex(lines: Iterable[Row], unmeasured: Iterable[Row] = (), tuning: str = "") -> str:
    """Return the summary as one booktabs table per panel."""
    return "\n".join(table.latex() for _, table in _summaries(lines, unmeasured, tuning))


def classification_markdown(rows: Iterable[Row]) -> str:
    """Return accuracies through the top n concepts as one Markdown table per set and protocol."""
    return "\n".join(
        f"## {title}\n\n{Printed(cells[0], 2, cells[1:], title).markdown()}\n"
        for title, cells in accuracies(rows)
    )


def classification_latex(rows: Iterable[Row]) -> str:
    """Return the same as booktabs tables."""
    return "\n".join(
        Printed(cells[0], 2, cells[1:], f"{title}.").latex() for title, cells in accuracies(rows)
    )
