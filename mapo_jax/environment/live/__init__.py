"""The live world: a user, a judge and a director played by language models.

Each role is a class (`user.py`, `judge.py`, `director.py`) over one function, `complete(messages) -> text`,
which comes from an OpenAI-compatible server (`client.py`, which evaluations of an endpoint use as well) or
from our own engine; the role does not know. Around that function stand the cache and the record of every
failure (`calls.py`); around the roles, the limits of time and the watch over the share of failures
(`guard.py`).
"""
