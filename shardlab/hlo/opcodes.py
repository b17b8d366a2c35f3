"""What opcodes do, as far as reading a module needs to know it."""

from __future__ import annotations

_PLAIN_WORDS = """
    abs add and bitcast bitcast-convert broadcast clamp compare concatenate constant convert convolution
    copy copy-done copy-start cosine divide dot dynamic-slice dynamic-update-slice exponential
    exponential-minus-one floor gather get-tuple-element iota log log-plus-one logistic maximum minimum
    multiply negate not or pad parameter partition-id power reduce reduce-precision reduce-window
    remainder reshape reverse rsqrt scatter select shift-left shift-right-logical sign sine slice sort
    sqrt subtract tanh transpose tuple xor
"""
PLAIN = frozenset(_PLAIN_WORDS.split())
"""What most instructions are: they run no computation (a reducer is no call: it runs once per element), and
move nothing between devices."""
