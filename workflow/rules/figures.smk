"""Figures: each figure of params.yaml, and the report that holds them all.

Expects results/tables; leaves results/figures/FIGURE (SVG, PDF, PNG, CSV, caption; of a table Markdown, LaTeX, CSV,
caption) and results/report.html.
"""


rule draw_figure:
    input:
        lambda w: jobs.figure(w.figure).inputs,
    output:
        svg="results/figures/{figure}/{figure}.svg",
        pdf="results/figures/{figure}/{figure}.pdf",
        png="results/figures/{figure}/{figure}.png",
        csv="results/figures/{figure}/{figure}.csv",
        caption="results/figures/{figure}/caption.md",
        record="results/figures/{figure}/provenance.json",
    log:
        "logs/draw_figure/{figure}.log",
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
        md="results/figures/{table}/{table}.md",
        tex="results/figures/{table}/{table}.tex",
        csv="results/figures/{table}/{table}.csv",
        caption="results/figures/{table}/caption.md",
        record="results/figures/{table}/provenance.json",
    log:
        "logs/write_table/{table}.log",
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
        html="results/report.html",
        record="results/report.html.provenance.json",
    log:
        "logs/write_report.log",
    conda:
        environment("figures")
    params:
        task=task(jobs.report()),
    shell:
        "python -m saeflow report {params.task:q} 2>&1 | tee {log}"
