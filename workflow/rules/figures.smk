"""Figures: each figure of params.yaml, and the report that holds them all.

Expects results/tables; leaves results/figures/FIGURE (SVG, PDF, PNG, CSV, caption; of a table Markdown, LaTeX, CSV,
caption) and results/report.html.
"""


rule draw_figure:
    input:
        lambda w: jobs.figure(w.figure).inputs,
    output:
        svg=report(
            "results/figures/{figure}/{figure}.svg",
            caption="../report/caption.rst",
            category="Figures",
            labels=lambda w: {"figure": find(w.figure).title},
        ),
        pdf="results/figures/{figure}/{figure}.pdf",
        png="results/figures/{figure}/{figure}.png",
        csv="results/figures/{figure}/{figure}.csv",
        caption="results/figures/{figure}/caption.md",
        record="results/figures/{figure}/provenance.json",
    log:
        "logs/draw_figure/{figure}.log",
    benchmark:
        "logs/benchmarks/draw_figure/{figure}.tsv"
    conda:
        environment("figures")
    params:
        task=lambda w: task(jobs.figure(w.figure)),
    shell:
        "python -m saeflow draw {params.task:q} 2>&1 | tee {log}"


rule write_table:
    input:
        lambda w: jobs.figure(w.table).inputs,
    output:
        md=report(
            "results/figures/{table}/{table}.md",
            caption="../report/caption.rst",
            category="Tables",
            labels=lambda w: {"table": find(w.table).title},
        ),
        tex="results/figures/{table}/{table}.tex",
        csv="results/figures/{table}/{table}.csv",
        caption="results/figures/{table}/caption.md",
        record="results/figures/{table}/provenance.json",
    log:
        "logs/write_table/{table}.log",
    benchmark:
        "logs/benchmarks/write_table/{table}.tsv"
    conda:
        environment("figures")
    params:
        task=lambda w: task(jobs.figure(w.table)),
    shell:
        "python -m saeflow draw {params.task:q} 2>&1 | tee {log}"


rule write_report:
    input:
        jobs.report().inputs,
    output:
        html=report(
            "results/report.html",
            caption="../report/report.rst",
            category="Report",
            labels={"page": "report.html"},
        ),
        record="results/report.html.provenance.json",
    log:
        "logs/write_report.log",
    benchmark:
        "logs/benchmarks/write_report.tsv"
    conda:
        environment("figures")
    params:
        task=task(jobs.report()),
    shell:
        "python -m saeflow report {params.task:q} 2>&1 | tee {log}"
