"""Finished calls in SQLite, so that a restarted run pays for none of them twice."""

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from mapo_jax.environment.roles import Completion
from mapo_jax.errors import UserError

CACHE_FILE = "calls.sqlite"


def address(**content: Any) -> str:
    """A digest of everything an answer depends on: role, model, settings, messages, schema, seed."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class CallCache:
    """Answers by address. Holds no prompt, no URL and no key."""

    def __init__(self, file: Path | str) -> None:
        """Opens or creates the file.

        Write-ahead logging needs shared memory, so hosts must not share the file. Processes that share a
        folder use one file each (`files.part_of`), as `role_models.keep_calls` does.

        Raises:
          UserError: the file is not such a cache, or cannot be written.
        """
        self._file = Path(file)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # Autocommit with a write-ahead log: no row waits for the disk, and a killed process loses none.
            # The event loop that uses it may be in another thread.
            self._rows = sqlite3.connect(
                self._file, isolation_level=None, timeout=30, check_same_thread=False
            )
            self._rows.execute("PRAGMA journal_mode=WAL")
            self._rows.execute("PRAGMA synchronous=NORMAL")
            self._rows.execute(
                "CREATE TABLE IF NOT EXISTS calls (address TEXT PRIMARY KEY, role TEXT NOT NULL, text TEXT "
                "NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL) WITHOUT ROWID"
            )
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error

    def get(self, key: str) -> Completion | None:
        """The answer at an address, if there is one."""
        query = "SELECT text, input_tokens, output_tokens FROM calls WHERE address = ?"
        row = self._execute(query, key).fetchone()
        return None if row is None else Completion(*row)

    def put(self, key: str, role: str, answer: Completion) -> None:
        """Stores a usable answer."""
        self._execute("INSERT OR REPLACE INTO calls VALUES (?, ?, ?, ?, ?)", key, role, *answer[:3])

    def _execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        try:
            return self._rows.execute(statement, values)
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def close(self) -> None:
        """Closes the file."""
        self._rows.close()

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            f"the cache of calls {self._file} cannot be used ({error}); free some space if the disk is full, "
            "else remove the file: the calls in it are then made again"
        )
