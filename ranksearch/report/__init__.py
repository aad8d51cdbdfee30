"""A rank map as one page that needs nothing else: dense and compressed side by side, layer by layer."""

from ranksearch.report.layers import LayerReport, measure_layers
from ranksearch.report.page import page, write_report

__all__ = ["LayerReport", "measure_layers", "page", "write_report"]
