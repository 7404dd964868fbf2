"""Triton kernels for what surrounds attention: pyramid, scores, selection, similarity, tables.

One module per room, with the room's function names. The rooms send CUDA tensors here; each
function only launches kernels on the current stream, so none of them makes the host wait.
"""
