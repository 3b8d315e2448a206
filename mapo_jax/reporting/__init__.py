"""A run folder as one page that a person enjoys reading; `mapo_jax.report` is the command."""
