"""Pallas kernels on Mosaic GPU for the rooms before attention, and where any such kernel runs.

Importing this package brings no Pallas along; `kernels.scores` does.
"""
