"""Parts of the supervised warm start: its chats, its packed rows, and the fresh model's initial weights."""
