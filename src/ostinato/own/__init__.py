"""Own cells: from a step in Python to a graph, its derivative, and the engine's program."""
