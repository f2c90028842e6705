"""What came out: all arms side by side, as JSON, Markdown and a table in the terminal."""

from flatreg.report.arms import SCHEMA, Report, Row
from flatreg.report.files import read_report, write_report, write_report_file
from flatreg.report.input_curvature import InputCurvature
from flatreg.report.judge import make_report
from flatreg.report.text import flagged_findings, table

__all__ = [
    "SCHEMA",
    "InputCurvature",
    "Report",
    "Row",
    "flagged_findings",
    "make_report",
    "read_report",
    "table",
    "write_report",
    "write_report_file",
]
