"""Figures of the report. Only this folder imports matplotlib, inside functions."""
