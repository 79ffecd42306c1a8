"""The pool in the engine: lookups and specs in the scheduler process, stores and loads in the worker's loop."""
