"""Pyramid sparse attention inside other libraries' models; each module imports its library late."""
