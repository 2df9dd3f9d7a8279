"""Tables: what the metrics are, the schema of every table, and how results are gathered, summarised and printed."""
