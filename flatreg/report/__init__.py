"""What came out: all arms side by side, as JSON, Markdown and a table in the terminal."""

from flatreg.evaluation.geometry.input_curvature import InputCurvature
from flatreg.report.make import make_report
from flatreg.report.rows import SCHEMA, Report, Row, read_report, write_report_file
from flatreg.report.text import table, write_report

__all__ = [
    "SCHEMA",
    "InputCurvature",
    "Report",
    "Row",
    "make_report",
    "read_report",
    "table",
    "write_report",
    "write_report_file",
]
