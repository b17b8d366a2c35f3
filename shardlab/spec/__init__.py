"""Stage 1 SPEC: mesh files, rules, methods, model dimensions, cases: pure values."""
