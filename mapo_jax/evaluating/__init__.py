"""What `mapo_jax.evaluate` is made of: getting answers, holding dialogues, judging transcripts, tables."""
