"""Published workloads as rows: what each was measured at, and the case that it is, or why it is none."""
