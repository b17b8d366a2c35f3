"""A value -> one self-contained HTML file: no network, charts drawn beforehand, readable without JavaScript.

The records of `parts` say what stands where; `case`, `comparison` and `review` make them from the values that
the terminal shows too; `write` puts them in the templates, where nothing is computed.
"""
