"""Reports of many runs in one table, one section a dataset and threat, losing runs included."""

from flatreg.results_table.files import insert_table, keep_results
from flatreg.results_table.runs import Run, read_runs
from flatreg.results_table.sections import Entry, Group, Section, sections
from flatreg.results_table.text import results_table, sections_text

__all__ = [
    "Entry",
    "Group",
    "Run",
    "Section",
    "insert_table",
    "keep_results",
    "read_runs",
    "results_table",
    "sections",
    "sections_text",
]
