"""One self-contained HTML page of where the time of GPUs went: it fetches nothing, and no name in it is markup."""

from counterflow.report.page.page import Page, trace_page

__all__ = ["Page", "trace_page"]
