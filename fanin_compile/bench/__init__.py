"""Benchmarks behind `fanin bench`: correct before timed, the sides interleaved, ratios within one run."""
