"""A second, independent counter of wire bytes: it walks the serialized HLO module and shares no code
with shardlab.
"""

from second_counter.counter import Count, count

__all__ = ["Count", "count"]
