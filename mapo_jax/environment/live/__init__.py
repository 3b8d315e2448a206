"""The live world: a user, a judge and a director played by language models.

Each role is a class (`user.py`, `judge.py`, `director.py`) over one function, `complete(messages) -> text`.
The model behind it is an OpenAI-compatible server (`client.py`, also used by evaluations of an endpoint) or
our own engine. `calls.py` adds a cache and a log of every failure to that function; `guard.py` adds time
limits and a maximum failure rate to the roles.
"""
