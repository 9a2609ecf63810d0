"""The commands of the `pithwood` command line, one file each.

`add` declares the arguments, `run` does the work and returns the exit code and what to print. Nothing heavy is imported
before `run`.
"""
