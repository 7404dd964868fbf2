"""Pallas kernels on Mosaic GPU for the rooms before attention.

Importing this package brings no Pallas along; `kernels.scores` does.
"""
