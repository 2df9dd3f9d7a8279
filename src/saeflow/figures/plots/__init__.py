"""The figures of the report: each file draws one, named after the file, and declares it as FIGURE."""
