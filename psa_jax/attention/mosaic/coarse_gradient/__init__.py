"""Gradients of coarse levels, whose blocks have few rows.

One kernel writes what each pair of blocks owes into slots of a workspace, another adds those up; a
round takes as many heads as fit.
"""
