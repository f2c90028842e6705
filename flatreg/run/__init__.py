"""Recipes: training, evaluation and report from a YAML file, in Python or on the command line."""
