"""What a merge leaves behind beside the weights: the report and the model card."""

from fastmerge.report.card import card
from fastmerge.report.report import Report

__all__ = ["Report", "card"]
