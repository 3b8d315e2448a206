"""The parts of the supervised warm start: its texts, its rows, and the fresh model's first weights."""
