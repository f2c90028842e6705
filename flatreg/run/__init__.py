"""Recipes: what trains, judges and reports, from a YAML file or the command line."""
