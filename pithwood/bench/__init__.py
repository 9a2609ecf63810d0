"""Benchmarks that the command line runs, and the results files that all benchmarks write."""
