"""Figures: each figure of params.yaml, and the report that holds them all.

Expects results/tables; leaves results/figures/FIGURE (SVG, PDF, PNG, CSV, caption; of a table Markdown, LaTeX, CSV,
caption) and results/report.html.
"""


rule draw_figure:
    input:
        tables="results/tables/provenance.json",
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
        key=lambda w: plan.key_figure(w.figure),
        figures=json.dumps(plan.figure()),
    shell:
        "python -m saeflow draw {wildcards.figure} --tables results/tables"
        " --figures {params.figures:q} --key {params.key}"
        " --out results/figures/{wildcards.figure} 2>&1 | tee {log}"


rule write_table:
    input:
        tables="results/tables/provenance.json",
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
        key=lambda w: plan.key_figure(w.table),
        figures=json.dumps(plan.figure()),
    shell:
        "python -m saeflow draw {wildcards.table} --tables results/tables"
        " --figures {params.figures:q} --key {params.key}"
        " --out results/figures/{wildcards.table} 2>&1 | tee {log}"


rule write_report:
    input:
        tables="results/tables/provenance.json",
        figures=FIGURES,
        pages=PAGES,
    output:
        html="results/report.html",
        record="results/report.html.provenance.json",
    log:
        "logs/write_report.log",
    conda:
        environment("figures")
    params:
        key=plan.key_report(),
        names=config["figures"]["names"],
        pages=[f"--page={run}" for run in plan.pages],
        mark=plan.mark,
    shell:
        "python -m saeflow report {params.names} {params.pages} --results results --key {params.key}"
        " --mark={params.mark:q} --out {output.html} 2>&1 | tee {log}"
