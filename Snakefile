"""The workflow, which is workflow/Snakefile, for `snakemake` at the top of a checkout."""


include: "workflow/Snakefile"


workflow.default_target = "all"  # Snakemake forgets that of an included file
