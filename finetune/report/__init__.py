"""The report: tables, plots, a verdict in words and one self-contained page, made from files alone. Never imports torch."""

from finetune.report.page import write
from finetune.report.tables import terminal_table

__all__ = ["terminal_table", "write"]
