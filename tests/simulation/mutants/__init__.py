"""`python -m tests.simulation.mutants`: bugs put back on purpose, each of which the simulator has to catch.

A mutant is one small change of lmkv (tests/simulation/mutants/table.py): a bug that was once found, or one planted
where a mistake would be easy. Each is applied in a copy of the tree, and worlds of `make simulate`'s own distribution
are run there, from seed 0 on, until one is not ok. No world is made for a mutant. One that survives is a hole in the
simulator.
"""
