"""Checks that end in PASS or in the first gate that fails: what the skills' scripts and `pithwood check` run."""
