"""Stage 7 REPORT: a value to terminal, Markdown, JSON."""
