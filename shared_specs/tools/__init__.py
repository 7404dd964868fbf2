"""What is not the specification: the `psa` command, the demo, parity of frameworks, and figures.

The top floor of the house. Tools may call any package; nothing outside this folder and the
benchmarks imports them.
"""
