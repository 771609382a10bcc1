"""The report page: one self-contained HTML file from what a run or an evaluation has written."""

from ldm_vae.report.page import build_report

__all__ = ["build_report"]
