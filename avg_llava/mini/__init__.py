"""A small drawn world in which the whole method can be trained and judged on a CPU, in minutes."""
