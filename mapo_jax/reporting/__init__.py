"""Reads run folders and draws them as one page; the command is `mapo_jax.report`."""
