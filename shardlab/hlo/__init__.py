"""Stage 3 PARSE: HLO text or proto to a Module."""
