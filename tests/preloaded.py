"""What tests/forked.py imports once for all its processes."""

import os
import sys

os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
# Without torch, which a user need not have either: two packages import it where it is, for seconds.
sys.modules["torch"] = None

import openai  # noqa: E402, F401
import tensorboardX  # noqa: E402, F401
import transformers.tokenization_utils_tokenizers  # noqa: E402, F401

import mapo_jax.environment.live.client  # noqa: E402
import mapo_jax.report  # noqa: E402
import mapo_jax.train  # noqa: E402, F401
