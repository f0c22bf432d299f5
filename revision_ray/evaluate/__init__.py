"""Benchmarks, the rules that score answers, and the run that puts the questions to a model."""
