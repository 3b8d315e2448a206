import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Third-party test data that is not part of the project; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("MAPO_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"third-party test data not found at {folder} (set MAPO_SHARED_DATA)")
    return folder
